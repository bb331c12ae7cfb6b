"""Averaging the shared parameters over the workers, in the transport's type."""

from collections.abc import Callable

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.filterwise.partition import shares


class Averaging:
    """Replaces the shared parameters, a flat (C,) float32 tensor on every rank, by what the workers agree on.

    What is averaged is each worker's change since the round began: the same mean, but where nothing changed nothing is rounded
    either, so that a learning rate of 0 leaves every bit as it was. A change is also what bfloat16 suits: its error is relative to the
    change, not to the parameter.

    float32: one all-reduce. bfloat16: rank r gets everybody's r-th chunk (all-to-all), sums it in float32, and tells all (all-gather):
    the two halves of an all-reduce, since Horovod's own knows no bfloat16, and would sum in it.
    """

    def __init__(self, shared: Tensor, world: World, transport: torch.dtype):
        self._shared, self._world = shared, world
        self._start = torch.empty_like(shared)
        self._exact = transport == shared.dtype
        if not self._exact:
            self._chunks = shares(shared.numel(), world.size)
            mine = self._chunks[world.rank]
            self._travels = torch.zeros_like(shared, dtype=transport)
            self._chunk_of_all = torch.zeros(world.size * mine, dtype=transport, device=shared.device)
            self._mean = torch.zeros(mine, dtype=transport, device=shared.device)

    def begin_round(self) -> None:
        """Remember the shared parameters, which all workers have alike now."""
        self._start.copy_(self._shared)

    def start(self) -> Callable[[], None]:
        """Send this worker's change; what is returned waits, and leaves the start plus the mean of all changes in the parameters."""
        change, size = self._shared, self._world.size
        change -= self._start
        if self._exact:
            summing = self._world.all_reduce_(change, "shared")
        else:
            self._travels.copy_(change)
            received = [len(self._mean)] * size
            summing = self._world.all_to_all(self._travels, self._chunk_of_all, self._chunks, received, "shared")

        def finish() -> None:
            summing()
            if self._exact:
                torch.add(self._start, change, alpha=1 / size, out=self._shared)
                return
            self._mean.copy_(self._chunk_of_all.view(size, -1).float().mean(0))
            self._world.all_gather(self._mean, self._travels, self._chunks, "shared")()
            torch.add(self._start, self._travels, out=self._shared)

        return finish
