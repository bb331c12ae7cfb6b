"""The ranks of a job and the collectives between them. The only importer of Horovod.

mpi4py is imported and started first and lends its world communicator to Horovod, so both share one MPI at
MPI_THREAD_MULTIPLE; the other order lets Horovod finalise MPI under mpi4py's feet (facts: environment.md).
"""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loft_hpc.comm import launch
from loft_hpc.comm.ledger import Entry, Ledger, chain_broadcast, ring_allgather, ring_allreduce
from loft_hpc.comm.pulse import Pulse
from loft_hpc.comm.staging import Staging
from loft_hpc.errors import LoftError
from loft_hpc.screen import tell

Item = TypeVar("Item")


class World:
    """All ranks of the job, as one of them sees them.

    Collectives take contiguous tensors, return at once, and give a `wait` function; every rank must call them in the same
    order. Each is entered in the ledger under its purpose. In a world of one rank they do nothing and cost nothing.
    """

    def __init__(self, mpi: Any, hvd: Any):
        self.mpi = mpi
        """mpi4py's world communicator."""
        self._hvd = hvd
        self.rank: int = mpi.Get_rank()
        self.size: int = mpi.Get_size()
        self.local_rank: int = hvd.local_rank()
        self.local_size: int = hvd.local_size()
        self.ledger = Ledger()
        self._faults = mpi.Dup()
        from mpi4py import MPI

        self._minimum = MPI.MIN
        self.pulse = Pulse()
        """When this rank last got on, and what it waits for: what a watchdog looks at."""
        self._staging = Staging(direct=False)
        self.cores: int | None = None
        """This rank's share of its machine's cores, once it is known."""
        self.threads: int | None = None
        """Threads that compute: as many, unless the user wants another number."""

    def alone(self) -> "World":
        """This rank as a world of its own, for work that ranks do side by side without one another. It keeps its GPU and its share of the cores."""
        from mpi4py import MPI

        world = World(MPI.COMM_SELF, self._hvd)
        world.cores, world.threads = self.cores, self.threads
        return world

    def use_device(self, device: torch.device, direct: bool) -> None:
        """Where tensors will lie, and whether Horovod takes GPU tensors as they are (NCCL, one rank per GPU)."""
        self._staging = Staging(direct=direct)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    @property
    def nccl(self) -> bool:
        """Whether Horovod was built with NCCL."""
        return bool(self._hvd.nccl_built())

    # -- collectives on tensors -------------------------------------------------------------------------------------------

    def all_reduce_(self, tensor: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Sum of `tensor` over the ranks, in place on every rank."""
        if self.size == 1:
            return lambda: tensor
        sent, received = ring_allreduce(tensor.numel(), tensor.element_size(), self.rank, self.size)
        size = tensor.numel() * tensor.element_size()
        self._record("allreduce", purpose, Entry(1, size, size, sent, received))
        host = self._staging.to_host(tensor, f"allreduce.{purpose}")
        name = f"allreduce.{purpose}"
        handle = self._hvd.allreduce_async_(host, name=name, op=self._hvd.Sum)
        return lambda: self._arrived(handle, name, host, tensor)

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], purpose: str) -> Callable[[], Tensor]:
        """Every rank's (counts[rank],) `tensor`, one after the other, into `output` of (sum(counts),), allocated by the caller."""
        if tensor.shape != (counts[self.rank],) or output.shape != (sum(counts),):
            raise ValueError(f"all_gather of {tuple(tensor.shape)} into {tuple(output.shape)} does not fit counts {counts}")
        if self.size == 1:
            return lambda: output.copy_(tensor)
        element = tensor.element_size()
        sent, received = ring_allgather(counts, element, self.rank)
        self._record("allgather", purpose, Entry(1, tensor.numel() * element, output.numel() * element, sent, received))
        host = _as_carried(self._staging.to_host(tensor, f"allgather.{purpose}.in"))
        target = self._staging.host_like(output, f"allgather.{purpose}.out")
        # Horovod's public allgather makes a new output tensor each time, and touching fresh memory costs more than the transfer
        # (bin/bench exchange); its own helper takes the output, which Horovod then only resizes to the size that it has already.
        from horovod.torch import mpi_ops

        handle = mpi_ops._allgather_async(host, _as_carried(target), f"allgather.{purpose}", self._hvd.global_process_set)
        return lambda: self._arrived(handle, f"allgather.{purpose}", target, output)

    def all_to_all(
        self, tensor: Tensor, output: Tensor, sent_counts: list[int], received_counts: list[int], purpose: str
    ) -> Callable[[], Tensor]:
        """`sent_counts[r]` elements of the (sum(sent_counts),) `tensor` to every rank r, one after the other; `output` gets theirs.

        Every rank's `received_counts[r]` must be what rank r sends it. What a rank keeps for itself is best left out (count 0).
        """
        if tensor.shape != (sum(sent_counts),) or output.shape != (sum(received_counts),):
            raise ValueError(
                f"all_to_all of {tuple(tensor.shape)} into {tuple(output.shape)} does not fit {sent_counts}, {received_counts}"
            )
        if self.size == 1:
            return lambda: output.copy_(tensor)
        element = tensor.element_size()
        sent = (sum(sent_counts) - sent_counts[self.rank]) * element
        received = (sum(received_counts) - received_counts[self.rank]) * element
        self._record("alltoall", purpose, Entry(1, sent, received, sent, received))
        host = _as_carried(self._staging.to_host(tensor, f"alltoall.{purpose}.in"))
        target = self._staging.host_like(output, f"alltoall.{purpose}.out")
        splits, arrived = torch.tensor(sent_counts, dtype=torch.int32), torch.empty(self.size, dtype=torch.int32)
        from horovod.torch import mpi_ops  # as for all_gather: into a buffer that is there already

        handle = mpi_ops._alltoall_async(host, splits, _as_carried(target), arrived, f"alltoall.{purpose}", self._hvd.global_process_set)
        return lambda: self._arrived(handle, f"alltoall.{purpose}", target, output)

    def _arrived(self, handle: int, name: str, target: Tensor, output: Tensor) -> Tensor:
        """Wait for Horovod to fill `target`, and bring it home into `output`."""
        with self.waiting(name):
            self._hvd.synchronize(handle)
        return self._staging.back(target, output)

    def broadcast_(self, tensor: Tensor, purpose: str, root: int = 0) -> Callable[[], Tensor]:
        """Root's `tensor`, in place on every rank."""
        if self.size == 1:
            return lambda: tensor
        size = tensor.numel() * tensor.element_size()
        sent, received = chain_broadcast(tensor.numel(), tensor.element_size(), self.rank, self.size, root)
        at_root = self.rank == root
        self._record("broadcast", purpose, Entry(1, size if at_root else 0, 0 if at_root else size, sent, received))
        host = self._staging.to_host(tensor, f"broadcast.{purpose}")
        name = f"broadcast.{purpose}"
        handle = self._hvd.broadcast_async_(host, root, name=name)
        return lambda: self._arrived(handle, name, host, tensor)

    def _record(self, operation: str, purpose: str, entry: Entry) -> None:
        if purpose in ("partitioned", "shared") and operation in ("allreduce", "allgather", "alltoall"):
            entry.poster_bytes = entry.payload_sent_bytes
        self.ledger.record(operation, purpose, entry)

    # -- small objects, outside the steps ---------------------------------------------------------------------------------

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. For small things, outside the steps; counted as `control`."""
        if self.size == 1:
            return [value]
        packed = pickle.dumps(value)
        with self.waiting("a gathering of objects"):
            everybody = self.mpi.allgather(packed)
        counts = [len(item) for item in everybody]
        sent, received = ring_allgather(counts, 1, self.rank)
        self.ledger.record("allgather", "control", Entry(1, len(packed), sum(counts), sent, received))
        return [pickle.loads(item) for item in everybody]

    def on_root(self, action: Callable[[], Any]) -> Any:
        """Rank 0 does something that others wait for; all ranks get the result, or all raise its LoftError or OSError. Counted as `control`."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except (LoftError, OSError) as error:
                problem = error
        if self.size > 1:
            with self.waiting("rank 0"):
                self.wait_quietly()
                packed = self.mpi.bcast(pickle.dumps((result, problem)) if self.rank == 0 else None)
            at_root, size = self.rank == 0, len(packed)
            sent, received = chain_broadcast(size, 1, self.rank, self.size)
            self.ledger.record("broadcast", "control", Entry(1, size if at_root else 0, 0 if at_root else size, sent, received))
            result, problem = pickle.loads(packed)
        if problem is not None:
            raise problem
        return result

    def smallest(self, values: Sequence[int]) -> list[int]:
        """The smallest of every rank's first value, second value, and so on: one small all-reduce, counted as `control`.

        Values lie within 64 bits. What is largest is asked for by giving it a minus.
        """
        if self.size == 1:
            return list(values)
        mine, result = np.array(values, dtype=np.int64), np.empty(len(values), dtype=np.int64)
        sent, received = ring_allreduce(len(mine), mine.itemsize, self.rank, self.size)
        self.ledger.record("allreduce", "control", Entry(1, mine.nbytes, mine.nbytes, sent, received))
        with self.waiting("a vote"):
            self.mpi.Allreduce(mine, result, op=self._minimum)
        return result.tolist()

    def wait_quietly(self) -> None:
        """Wait for every rank without keeping a core busy, which rank 0 may need for what it does (and times)."""
        everybody = self.mpi.Ibarrier()
        while not everybody.Test():
            time.sleep(0.001)

    def barrier(self) -> None:
        """Wait for every rank."""
        with self.waiting("a barrier"):
            self.mpi.Barrier()

    # -- signs of life ----------------------------------------------------------------------------------------------------

    def waiting(self, name: str) -> AbstractContextManager[None]:
        """Around whatever waits for another rank, so that a watchdog knows who keeps whom waiting."""
        return self.pulse.waiting(name)

    def paced(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, for instance the batches of a training: each is a sign of life."""
        for item in items:
            self.pulse.beat()
            yield item

    # -- the end of a job that failed -------------------------------------------------------------------------------------

    def failed_together(self, patience_seconds: float = 3.0) -> bool:
        """Called by a rank that failed: whether every other rank failed too, as after a mistake that all of them see.

        If not, the others are at work or wait in a collective for this rank, and only `abort` can end them.
        """
        everybody = self._faults.Ibarrier()
        end = time.monotonic() + patience_seconds
        while time.monotonic() < end:
            if everybody.Test():
                return True
            time.sleep(0.01)
        return False

    def abort(self, code: int = 1) -> None:
        """End the job on all ranks, now. A rank waiting in a raw MPI call would otherwise hang for ever."""
        self.mpi.Abort(code)
        os._exit(code)  # MPI implementations may return from Abort in a world of one


def _as_carried(tensor: Tensor) -> Tensor:
    """The same memory in a type that Horovod knows: it has no bfloat16, but moves 16-bit integers."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def start() -> World:
    """Start MPI and Horovod. Raises LoftError where they are missing or where MPI sees another world than the launcher made."""
    launch.refuse_without_home()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as problem:
        raise LoftError(f"MPI does not load ({problem}): run bin/setup, or load the MPI module that it was set up with") from None
    _take_back_signals()
    said = launch.announced()
    size = MPI.COMM_WORLD.Get_size()
    if said and said[1] != size:
        raise LoftError(
            f"the launcher announced {said[1]} ranks, but MPI sees a world of {size}: the launcher belongs to another MPI; "
            "use the mpirun that `loft doctor` names, or srun --mpi=pmix",
            usage=True,
        )
    hvd, problem = _horovod(MPI)
    # A rank that stopped here alone would leave the others waiting inside Horovod.
    problems = {rank: text for rank, text in enumerate(MPI.COMM_WORLD.allgather(problem)) if text}
    if problems:
        rank, text = next(iter(problems.items()))
        raise LoftError(text if len(problems) == size else f"rank {rank}: {text}", everywhere=True)
    try:
        hvd.init(comm=MPI.COMM_WORLD)
        return World(MPI.COMM_WORLD, hvd)
    except Exception as problem:  # the others are inside Horovod already, where only an abort reaches them
        tell(f"loft: rank {MPI.COMM_WORLD.Get_rank()}: Horovod does not start ({problem}): see loft doctor", error=True)
        MPI.COMM_WORLD.Abort(1)
        raise


def _take_back_signals() -> None:
    """Set this process's handlers again: MPI puts its own in their place as it starts (Open MPI 5: that of HUP), and nobody would be told."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)


def _horovod(MPI: Any) -> tuple[Any, str]:
    """Horovod's module, or why this rank cannot use it."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return None, "this MPI gives no MPI_THREAD_MULTIPLE, which Horovod beside mpi4py needs: load an MPI built with it"
    try:
        import horovod.torch as hvd
    except ImportError as problem:
        return None, f"Horovod does not load ({problem}): run bin/setup"
    return hvd, ""
