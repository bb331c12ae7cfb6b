"""What every way of training a network over the ranks offers to the session that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.runs.run import Checkpoint


@dataclass(frozen=True)
class Advance:
    """What happened since the last call."""

    step: int
    """Local steps done so far."""
    mean_loss: float
    """Mean loss of this rank's steps in this stretch."""
    exchange_seconds: float
    """Wall time of this rank in collectives and in unpacking them, or in waiting for messages."""
    rounds: int | None = None
    """Rounds done so far, where the strategy has rounds."""


def refuse_other_network(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises LoftError unless a checkpoint's tensors are those expected, by name and shape."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        raise LoftError("the checkpoint belongs to another network: resume with the options that the run was started with")


class Strategy(ABC):
    """Trains a network from step 0 to `total_steps`, all ranks together."""

    total_steps: int
    steps_per_epoch: int
    batch_images: int
    """Images that this rank sees in a step."""

    @abstractmethod
    def advance(self) -> Advance:
        """Train up to the next point where all ranks agree on the full state (a round, a step) and return what happened."""

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Parameters of the full network, the same on every rank. Called between `advance`s; a snapshot, not live."""

    @abstractmethod
    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, counters) from which `restore` continues bitwise, the same on every rank."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises LoftError where it belongs to another configuration."""
