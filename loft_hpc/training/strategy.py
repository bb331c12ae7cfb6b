"""What every way of training a network over the ranks offers to the session that runs it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, Selection
from loft_hpc.models.scores import CRITERIA, Scores
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.schedule import Schedule


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
    diverged_at: int | None = None
    """The first step (from 1) of this stretch whose loss was not a finite number, or the last where what it left was not; None where all is."""


def summed(losses: Tensor, first_step: int, *held: Tensor) -> tuple[float, int | None]:
    """Sum of the (steps,) losses of the steps from `first_step` (counted from 0) on, and `Advance.diverged_at` for them.

    `held`: what the last update left. A loss tells of the updates before it, but not of its own; so the extremes of what is held, which are
    NaN where any of it is, come along with the losses: one more pass over memory, and no more waiting for the device.
    """
    extremes = [extreme for tensor in held if tensor.numel() for extreme in torch.aminmax(tensor.detach())]
    values = torch.cat([losses, torch.stack(extremes)]).tolist() if extremes else losses.tolist()  # one wait for the device
    steps = len(losses)
    wrong = next((place for place, value in enumerate(values) if not math.isfinite(value)), None)
    return sum(values[:steps]), None if wrong is None else first_step + min(wrong + 1, steps)


def bit_sum(tensor: Tensor) -> Tensor:
    """A sum over the bits of a float32 tensor, which any single change alters; int64, on its device."""
    return tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64)


def bits(tensor: Tensor) -> int:
    """The same as a number."""
    return int(bit_sum(tensor))


def refuse_other_network(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises LoftError unless a checkpoint's tensors are those expected, by name, shape and type."""
    if found.keys() != expected.keys() or any(
        found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype for name in expected
    ):
        raise LoftError("the checkpoint belongs to another network: resume with the options that the run was started with")


def everybodys_scores(mine: Scores, held: Selection, groups: Sequence[FilterGroup], world: World) -> dict[str, Tensor]:
    """The scores of all filters, out of those that each rank answers for. Collective: one small all-reduce.

    `mine` are this rank's scores, of the filters `held` of each group (groups that it does not answer for are left out of both); every
    filter has one rank that answers for it. The others add zeros, so what arrives is exactly what was computed.
    """
    places, end = {}, 0
    for criterion in CRITERIA:
        for group in groups:
            places[f"{criterion}/{group.name}"] = slice(end, end + group.width)
            end += group.width
    everything = torch.zeros(end)
    for name, scores in mine.items():
        everything[places[name]].index_copy_(0, held[name.split("/", 1)[1]], scores)
    world.all_reduce_(everything, "control")()
    return {name: everything[place] for name, place in places.items()}


class Strategy(ABC):
    """Trains a network from step 0 to `total_steps`, all ranks together."""

    total_steps: int
    steps_per_epoch: int
    any_world_size: bool = False
    """Whether a checkpoint of another number of ranks can be gone on with."""
    batch_images: int
    """Images that this rank sees in a step."""
    schedule: Schedule
    """The learning rate of its steps."""
    expected_rounds: int = 0
    """Rounds in the whole training, where the strategy has rounds."""

    @property
    def settled(self) -> bool:
        """Whether there is a full state to look at and to resume from just now."""
        return True

    @abstractmethod
    def advance(self, limit: int | None = None) -> Advance:
        """Train up to the next point where all ranks agree on the full state (a round, a few steps) and return what happened.

        Not past step `limit`, unless a round ends later: rounds are never cut short, but by the end of the training.
        """

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Parameters of the full network, the same on every rank. Called between `advance`s; a snapshot, not live."""

    @abstractmethod
    def filter_scores(self) -> dict[str, Tensor]:
        """What the hidden filters are ranked by (models/scores.py), the same on every rank, without putting the network together."""

    @abstractmethod
    def digest(self) -> int:
        """Of what all ranks must have alike just now, to the last bit: any number; 0 where there is nothing of the kind."""

    @abstractmethod
    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, counters) from which `restore` continues bitwise, the same on every rank."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises LoftError where it belongs to another configuration."""
