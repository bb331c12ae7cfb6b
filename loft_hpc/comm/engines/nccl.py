"""Collectives by NCCL through torch.distributed, on GPUs that ranks have to themselves: torch's wheel has it, so no nvcc is needed.

Ranks find one another by an address that mpi4py hands round. What lies in host memory goes by mpi4py.
"""

import atexit
import socket
from typing import Any

import torch
from torch import Tensor

from loft_hpc.comm.engines import Wait
from loft_hpc.comm.engines.mpi4py import Mpi4py
from loft_hpc.errors import LoftError


def problem() -> str | None:
    """Why this rank cannot use NCCL: None if it can."""
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_nccl_available()):
        return "--engine nccl: this torch was built without NCCL: install torch for CUDA, or give --engine mpi4py"
    return None


def open_engine(comm: Any, chosen: bool) -> "Nccl":
    return Nccl(comm)


class Nccl:
    """NCCL over the ranks of `comm`; ready once `on` has named their GPUs."""

    name = "nccl"

    def __init__(self, comm: Any):
        self._comm, self._host, self._device = comm, Mpi4py(comm), None

    def on(self, device: torch.device, alone: bool) -> "Nccl":
        if device.type != "cuda" or not alone:
            found = "two ranks share one" if device.type == "cuda" else "they compute on CPUs"
            raise LoftError(
                f"--engine nccl needs a GPU for every rank, but {found}: start as many ranks as there are GPUs, or give --engine mpi4py",
                usage=True, everywhere=True,
            )  # fmt: skip
        if self._device is None:
            self._device = device
            self._join()
        return self

    def _join(self) -> None:
        import torch.distributed as distributed

        rank, size = self._comm.Get_rank(), self._comm.Get_size()
        names = self._comm.allgather(socket.gethostname())
        host = "127.0.0.1" if len(set(names)) == 1 else names[0]
        store = distributed.TCPStore(host, 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = self._comm.bcast(store.port if store else None)
        store = store or distributed.TCPStore(host, port, size, is_master=False)
        distributed.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=self._device)
        atexit.register(distributed.destroy_process_group)

    def takes(self, device: torch.device, alone: bool) -> bool:
        return True

    def all_reduce_(self, tensor: Tensor, name: str) -> Wait:
        if not tensor.is_cuda:
            return self._host.all_reduce_(tensor, name)
        import torch.distributed as distributed

        return distributed.all_reduce(tensor, async_op=True).wait

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], name: str) -> Wait:
        if not tensor.is_cuda:
            return self._host.all_gather(tensor, output, counts, name)
        import torch.distributed as distributed

        return distributed.all_gather(list(output.split(counts)), tensor, async_op=True).wait

    def all_to_all(self, tensor: Tensor, output: Tensor, sent_counts: list[int], received_counts: list[int], name: str) -> Wait:
        if not tensor.is_cuda:
            return self._host.all_to_all(tensor, output, sent_counts, received_counts, name)
        import torch.distributed as distributed

        return distributed.all_to_all_single(output, tensor, received_counts, sent_counts, async_op=True).wait

    def broadcast_(self, tensor: Tensor, root: int, name: str) -> Wait:
        if not tensor.is_cuda:
            return self._host.broadcast_(tensor, root, name)
        import torch.distributed as distributed

        return distributed.broadcast(tensor, root, async_op=True).wait
