"""What carries the collectives of a job, one engine a file, and which of them a job takes.

All engines move the same tensors and enter the same bytes. Horovod and mpi4py also sum to the same bits (tests/ranks/check_engines.py);
NCCL, which sums in an order of its own, has not run yet.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from loft_hpc.errors import LoftError

if TYPE_CHECKING:  # the command line asks for names of engines before anything needs torch
    import torch
    from torch import Tensor

ENGINES = ("horovod", "mpi4py", "nccl")
AUTO = "auto"
NOT_INSTALLED = "Horovod is not installed: run bin/setup, or give --engine mpi4py"
Wait = Callable[[], Any]
"""Waits until a collective is done. On a GPU, until what this rank computes next finds its result."""


class Engine(Protocol):
    """Carries collectives on contiguous tensors between all ranks of a communicator.

    Every rank calls them in the same order. `name` is the same on all ranks; no two that are under way have the same one.
    """

    name: str

    def on(self, device: torch.device, alone: bool) -> Engine:
        """The engine to use for tensors of this device, which no other rank uses if `alone`. Collective.

        Raises LoftError where this engine cannot serve there.
        """

    def takes(self, device: torch.device, alone: bool) -> bool:
        """Whether tensors of this device need no copy in host memory."""

    def all_reduce_(self, tensor: Tensor, name: str) -> Wait:
        """Sum over the ranks, in place."""

    def all_gather(self, tensor: Tensor, output: Tensor, counts: list[int], name: str) -> Wait:
        """Every rank's (counts[rank],) `tensor`, one after the other, into the (sum(counts),) `output`."""

    def all_to_all(self, tensor: Tensor, output: Tensor, sent_counts: list[int], received_counts: list[int], name: str) -> Wait:
        """`sent_counts[r]` elements of `tensor` to each rank r; `received_counts[r]` elements from each into `output`."""

    def broadcast_(self, tensor: Tensor, root: int, name: str) -> Wait:
        """Root's `tensor`, in place."""


def done() -> None:
    """Waits for a collective that is done already."""


def open_engine(asked: str, comm: Any) -> Engine:
    """The engine for all ranks of mpi4py's communicator `comm`: `asked`, or for `auto` Horovod where it is installed. Collective.

    Raises LoftError, on all ranks, where one of them cannot load it, or was started with another `asked`.
    """
    names = ("horovod", "mpi4py") if asked == AUTO else (asked,)
    engines = {name: import_module(f"loft_hpc.comm.engines.{name}") for name in names}
    # A rank that stopped here alone would leave the others waiting.
    everybody = comm.allgather((asked, {name: engine.problem() for name, engine in engines.items()}))
    for rank, (theirs, _) in enumerate(everybody):
        if theirs != everybody[0][0]:
            raise LoftError(
                f"rank 0 was started with --engine {everybody[0][0]}, rank {rank} with --engine {theirs}: start all ranks alike",
                usage=True, everywhere=True,
            )  # fmt: skip
    for name, engine in engines.items():
        problems = {rank: found[name] for rank, (_, found) in enumerate(everybody) if found[name] is not None}
        if not problems:
            return engine.open_engine(comm, chosen=asked != AUTO)
        somewhere = len(problems) < len(everybody)
        if somewhere or asked != AUTO or set(problems.values()) != {NOT_INSTALLED}:
            rank, problem = next(iter(problems.items()))
            raise LoftError(f"rank {rank}: {problem}" if somewhere else problem, everywhere=True)
    raise AssertionError("mpi4py has no problem here")
