"""Averaging the shared parameters over the workers, in the transport's type."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.models.groups import shares

_CACHED_ELEMENTS = 1 << 16


class Averaging:
    """Replaces the shared parameters, a flat (C,) float32 tensor on every rank, by what the workers agree on.

    What is averaged is each worker's change since they last agreed: the same mean, but where nothing changed nothing is rounded
    either, so that a learning rate of 0 leaves every bit as it was. A change is also what bfloat16 suits: its error is relative to the
    change, not to the parameter.

    float32: one all-reduce. bfloat16: rank r gets everybody's r-th chunk (all-to-all), sums it in float32, and tells all (all-gather):
    the two halves of an all-reduce, since Horovod's own knows no bfloat16, and would sum in it.

    On a CPU what surrounds the collectives is bound by memory, so it goes through the buffers a piece at a time, each piece staying in
    the cache for all that is done with it.
    """

    def __init__(self, shared: Tensor, world: World, transport: torch.dtype, on_gpu: bool):
        self._shared, self._world = shared, world
        self._agreed = torch.empty_like(shared)
        self._exact = transport == shared.dtype
        self._piece = max(shared.numel(), 1) if on_gpu else _CACHED_ELEMENTS
        if not self._exact:
            self._chunks = shares(shared.numel(), world.size)
            mine = self._chunks[world.rank]
            self._travels = torch.zeros_like(shared, dtype=transport)
            self._chunk_of_all = torch.zeros(world.size * mine, dtype=transport, device=shared.device)
            self._mean = torch.zeros(mine, dtype=transport, device=shared.device)
            self._one, self._other = (torch.empty(min(self._piece, shared.numel()), device=shared.device) for _ in range(2))

    def agree(self) -> None:
        """Take note that all workers have the shared parameters alike now: at the start, and where they were loaded."""
        self._agreed.copy_(self._shared)

    def start(self) -> Callable[[], None]:
        """Send this worker's change; what is returned waits, and leaves what was agreed on plus the mean of all changes."""
        if self._exact:
            self._shared -= self._agreed
            summing = self._world.all_reduce_(self._shared, "shared")
            return lambda: self._add_sum(summing)
        for shared, agreed, travels in self._pieces(self._shared, self._agreed, self._travels):
            travels.copy_(torch.sub(shared, agreed, out=self._one[: len(shared)]))
        received = [len(self._mean)] * self._world.size
        meeting = self._world.all_to_all(self._travels, self._chunk_of_all, self._chunks, received, "shared")
        return lambda: self._add_mean(meeting)

    def _add_sum(self, summing: Callable[[], Tensor]) -> None:
        summing()
        for shared, agreed in self._pieces(self._shared, self._agreed):
            agreed.add_(shared, alpha=1 / self._world.size)
            shared.copy_(agreed)

    def _add_mean(self, meeting: Callable[[], Tensor]) -> None:
        meeting()
        workers = self._chunk_of_all.split(len(self._mean)) if len(self._mean) else ()
        # Converted first, then added: an operation on two types at once takes torch five times as long.
        for mean, *changes in self._pieces(self._mean, *workers):
            total = self._one[: len(mean)].copy_(changes[0])
            for change in changes[1:]:
                total += self._other[: len(mean)].copy_(change)
            mean.copy_(total.div_(self._world.size))
        self._world.all_gather(self._mean, self._travels, self._chunks, "shared")()
        for shared, agreed, travels in self._pieces(self._shared, self._agreed, self._travels):
            agreed.add_(self._one[: len(travels)].copy_(travels))
            shared.copy_(agreed)

    def _pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(tensor.split(self._piece) for tensor in tensors), strict=True)
