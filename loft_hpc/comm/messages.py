"""Messages from rank to rank, for what is no collective: mpi4py, non-blocking, on buffers that the caller keeps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loft_hpc.comm.ledger import Entry
from loft_hpc.comm.staging import Staging
from loft_hpc.comm.world import World


class Messages:
    """Sends and receives of contiguous tensors, in the ledger as `send` and `receive`. Made by all ranks together.

    Tags tell messages of one pair of ranks apart; those with the same tag arrive in the order in which they were sent. A tensor that
    is being sent or received must be left alone until its `wait` has returned.
    """

    def __init__(self, world: World):
        self._world = world
        self._mpi = world.mpi.Dup() if world.size > 1 else None  # tags of our own, apart from anybody else's
        self._staging = Staging(direct=False)  # NCCL carries no messages of ours: GPU tensors go through pinned host memory

    def send(self, tensor: Tensor, to: int, tag: int, purpose: str) -> Callable[[], None]:
        size = tensor.numel() * tensor.element_size()
        self._world.ledger.record("send", purpose, Entry(1, size, 0, size, 0))
        host = self._staging.to_host(tensor, f"send.{purpose}.{tag}")
        request = self._mpi.Isend(_bytes(host), to, tag)
        return lambda kept=host: self._wait(request, f"a message to rank {to}")  # the memory must live as long as the request

    def receive(self, tensor: Tensor, source: int, tag: int, purpose: str) -> Callable[[], Tensor]:
        size = tensor.numel() * tensor.element_size()
        self._world.ledger.record("receive", purpose, Entry(1, 0, size, 0, size))
        host = self._staging.host_like(tensor, f"receive.{purpose}.{tag}")
        request = self._mpi.Irecv(_bytes(host), source, tag)

        def wait() -> Tensor:
            self._wait(request, f"a message from rank {source}")
            return self._staging.back(host, tensor)

        return wait

    def _wait(self, request: Any, what: str) -> None:
        with self._world.waiting(what):
            request.Wait()


def _bytes(tensor: Tensor) -> np.ndarray:
    if not tensor.is_contiguous():
        raise ValueError("a message must be contiguous in memory")
    return tensor.detach().view(-1).view(torch.uint8).numpy()
