"""Collectives by mpi4py alone: wheels, no compiler. It takes tensors in host memory.

The calls block. MPI moves nothing between calls without a thread of its own, so non-blocking ones would hide nothing; and their reductions
sum in another order than the blocking ones, which Horovod uses too: with these, runs have Horovod's bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loft_hpc.comm.engines import Engine, Wait, done


def problem() -> None:
    """It is there: without mpi4py there would be no communicator."""


def open_engine(comm: Any, chosen: bool) -> "Mpi4py":
    return Mpi4py(comm, chosen)


class Mpi4py:
    """mpi4py over the ranks of `comm`. Unless it was `chosen`, NCCL takes its place where every rank has a GPU of its own."""

    name = "mpi4py"

    def __init__(self, comm: Any, chosen: bool = True):
        from mpi4py import MPI

        self._given, self._comm, self._chosen = comm, comm.Dup(), chosen  # a duplicate: apart from what others send
        self._sum, self._in_place = MPI.SUM, MPI.IN_PLACE

    def on(self, device: torch.device, alone: bool) -> Engine:
        if self._chosen or device.type != "cuda" or not alone:
            return self
        from loft_hpc.comm.engines import nccl

        return self if nccl.problem() else nccl.Nccl(self._given).on(device, alone)

    def takes(self, device: torch.device, alone: bool) -> bool:
        return device.type == "cpu"

    def all_reduce_(self, tensor: Tensor, name: str) -> Wait:
        self._comm.Allreduce(self._in_place, tensor.numpy(), op=self._sum)
        return done

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], name: str) -> Wait:
        self._comm.Allgatherv(_array(tensor), [_array(output), counts])
        return done

    def all_to_all(self, tensor: Tensor, output: Tensor, sent_counts: list[int], received_counts: list[int], name: str) -> Wait:
        self._comm.Alltoallv([_array(tensor), sent_counts], [_array(output), received_counts])
        return done

    def broadcast_(self, tensor: Tensor, root: int, name: str) -> Wait:
        self._comm.Bcast(_array(tensor), root)
        return done


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory in a type that MPI moves: it has no bfloat16, but moves 16-bit integers."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _array(tensor: Tensor) -> np.ndarray:
    if not tensor.is_contiguous():
        raise ValueError("a tensor must be contiguous in memory to be sent")
    return as_integers(tensor.detach()).numpy()
