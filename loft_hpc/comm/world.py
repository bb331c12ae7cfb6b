"""The ranks of a job and the collectives between them, with a ledger of their bytes. An engine carries them."""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loft_hpc.comm.engines import Engine, Wait
from loft_hpc.comm.ledger import Entry, Ledger, chain_broadcast, ring_allgather, ring_allreduce
from loft_hpc.comm.pulse import Pulse
from loft_hpc.comm.staging import Staging
from loft_hpc.errors import LoftError

Item = TypeVar("Item")


class World:
    """All ranks of the job, as one of them sees them.

    Collectives take contiguous tensors, return at once, and give a `wait` function; every rank must call them in the same
    order. Each is entered in the ledger under its purpose. In a world of one rank they do nothing and cost nothing.
    """

    def __init__(self, mpi: Any, engine: Engine):
        from mpi4py import MPI

        self.mpi = mpi
        """mpi4py's communicator of all ranks."""
        self._engine = engine
        self.rank: int = mpi.Get_rank()
        self.size: int = mpi.Get_size()
        machine = mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = machine.Get_rank()
        self.local_size: int = machine.Get_size()
        machine.Free()
        self.ledger = Ledger()
        self._faults = mpi.Dup()
        self._minimum = MPI.MIN
        self.pulse = Pulse()
        """When this rank last got on, and what it waits for: what a watchdog looks at."""
        self._staging = Staging(direct=False)
        self.cores: int | None = None
        """This rank's share of its machine's cores, once it is known."""
        self.threads: int | None = None
        """Threads that compute: as many, unless the user wants another number."""

    @property
    def engine(self) -> str | None:
        """Name of what carries the collectives; None where there is nobody to exchange with."""
        return self._engine.name

    def use_device(self, device: torch.device, alone: bool) -> bool:
        """Where tensors will lie, and whether no other rank uses that device. Returns whether they are exchanged without a copy on the host.

        Collective. Raises LoftError where the engine that was asked for cannot serve there.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._engine = self._engine.on(device, alone)
        direct = self._engine.takes(device, alone)
        self._staging = Staging(direct=direct)
        return direct

    # -- collectives on tensors -------------------------------------------------------------------------------------------

    def all_reduce_(self, tensor: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Sum of `tensor` over the ranks, in place on every rank."""
        if self.size == 1:
            return lambda: tensor
        sent, received = ring_allreduce(tensor.numel(), tensor.element_size(), self.rank, self.size)
        size = tensor.numel() * tensor.element_size()
        self._record("allreduce", purpose, Entry(1, size, size, sent, received))
        name = f"allreduce.{purpose}"
        host = self._staging.to_host(tensor, name)
        return self._under_way(name, host, tensor, self._engine.all_reduce_, host)

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], purpose: str) -> Callable[[], Tensor]:
        """Every rank's (counts[rank],) `tensor`, one after the other, into `output` of (sum(counts),), allocated by the caller."""
        if tensor.shape != (counts[self.rank],) or output.shape != (sum(counts),):
            raise ValueError(f"all_gather of {tuple(tensor.shape)} into {tuple(output.shape)} does not fit counts {counts}")
        if self.size == 1:
            return lambda: output.copy_(tensor)
        element = tensor.element_size()
        sent, received = ring_allgather(counts, element, self.rank)
        self._record("allgather", purpose, Entry(1, tensor.numel() * element, output.numel() * element, sent, received))
        name = f"allgather.{purpose}"
        host = self._staging.to_host(tensor, f"{name}.in")
        target = self._staging.host_like(output, f"{name}.out")
        return self._under_way(name, target, output, self._engine.all_gather, host, target, counts)

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
        name = f"alltoall.{purpose}"
        host = self._staging.to_host(tensor, f"{name}.in")
        target = self._staging.host_like(output, f"{name}.out")
        return self._under_way(name, target, output, self._engine.all_to_all, host, target, sent_counts, received_counts)

    def _under_way(self, name: str, target: Tensor, output: Tensor, carry: Callable[..., Wait], *arguments: Any) -> Callable[[], Tensor]:
        """Start a collective that fills `target`. What it returns waits for that, and brings the result home into `output`."""
        with self.waiting(name):  # some engines block here, others in `wait`
            wait = carry(*arguments, name)

        def arrived() -> Tensor:
            with self.waiting(name):
                wait()
            return self._staging.back(target, output)

        return arrived

    def broadcast_(self, tensor: Tensor, purpose: str, root: int = 0) -> Callable[[], Tensor]:
        """Root's `tensor`, in place on every rank."""
        if self.size == 1:
            return lambda: tensor
        size = tensor.numel() * tensor.element_size()
        sent, received = chain_broadcast(tensor.numel(), tensor.element_size(), self.rank, self.size, root)
        at_root = self.rank == root
        self._record("broadcast", purpose, Entry(1, size if at_root else 0, 0 if at_root else size, sent, received))
        name = f"broadcast.{purpose}"
        host = self._staging.to_host(tensor, name)
        return self._under_way(name, host, tensor, self._engine.broadcast_, host, root)

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
