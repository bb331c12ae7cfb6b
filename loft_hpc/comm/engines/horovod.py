"""Collectives by Horovod over MPI, and over NCCL where it was built with it. The only importer of Horovod.

mpi4py starts first and lends its communicator to Horovod, so that both share one MPI at MPI_THREAD_MULTIPLE; with Horovod first, its
shutdown would end MPI.

Two of its calls are private: `mpi_ops._allgather_async` and `_alltoall_async`, which take the output tensor. The public ones make a new
one each time, and touching fresh memory costs more than the transfer (bin/bench exchange). A release that changes their parameters breaks
here, at the first exchange of a run with a TypeError: then the public ones, followed by a copy, do the same.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from loft_hpc.comm.engines import NOT_INSTALLED, Wait
from loft_hpc.comm.engines.mpi4py import as_integers
from loft_hpc.screen import tell


def problem() -> str | None:
    """Why this rank cannot use Horovod; None if it can."""
    if find_spec("horovod") is None:
        return NOT_INSTALLED
    try:
        import horovod.torch  # noqa: F401
    except ImportError as problem:
        return f"Horovod does not load ({problem}): run bin/setup, or give --engine mpi4py"
    return None


def open_engine(comm: Any, chosen: bool) -> "Horovod":
    return Horovod(comm)


class Horovod:
    """Horovod over the ranks of `comm`."""

    name = "horovod"

    def __init__(self, comm: Any):
        import horovod.torch as hvd

        self._hvd = hvd
        try:
            hvd.init(comm=comm)
        except Exception as problem:  # the others are inside Horovod already, where only an abort reaches them
            tell(f"loft: rank {comm.Get_rank()}: Horovod does not start ({problem}): see loft doctor", error=True)
            comm.Abort(1)
            raise

    def on(self, device: torch.device, alone: bool) -> "Horovod":
        return self

    def takes(self, device: torch.device, alone: bool) -> bool:
        """NCCL refuses two ranks on one GPU."""
        return device.type == "cpu" or (alone and bool(self._hvd.nccl_built()))

    def all_reduce_(self, tensor: Tensor, name: str) -> Wait:
        return self._wait(self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], name: str) -> Wait:
        from horovod.torch import mpi_ops

        return self._wait(mpi_ops._allgather_async(as_integers(tensor), as_integers(output), name, self._hvd.global_process_set))

    def all_to_all(self, tensor: Tensor, output: Tensor, sent_counts: list[int], received_counts: list[int], name: str) -> Wait:
        from horovod.torch import mpi_ops

        splits, arrived = torch.tensor(sent_counts, dtype=torch.int32), torch.empty(len(sent_counts), dtype=torch.int32)
        return self._wait(
            mpi_ops._alltoall_async(as_integers(tensor), splits, as_integers(output), arrived, name, self._hvd.global_process_set)
        )

    def broadcast_(self, tensor: Tensor, root: int, name: str) -> Wait:
        return self._wait(self._hvd.broadcast_async_(tensor, root, name=name))

    def _wait(self, handle: int) -> Wait:
        return lambda: self._hvd.synchronize(handle)
