"""What a session keeps account of between two ends of an epoch."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from loft_hpc.training.strategy import Advance


class Clock:
    """Wall time since the training began, in seconds."""

    def __init__(self) -> None:
        self.start_at(0.0)

    def start_at(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


class Stretch:
    """What happened since the last epoch ended, on this rank."""

    def __init__(self, first_step: int):
        self.first_step, self.steps = first_step, 0
        self.losses = 0.0
        """Sum over the steps."""
        self.seconds = self.exchange_seconds = 0.0
        """Wall time of training (without snapshots, evaluations and checkpoints), and the part of it in exchanges."""

    def add(self, done: Advance, steps: int, seconds: float) -> None:
        self.steps += steps
        self.losses += done.mean_loss * steps
        self.seconds += seconds
        self.exchange_seconds += done.exchange_seconds

    @property
    def mean_loss(self) -> float:
        return self.losses / self.steps

    def to_json(self, losses: Sequence[float]) -> dict[str, Any]:
        """With the `losses` of all ranks."""
        return {
            "first_step": self.first_step, "losses": list(losses), "seconds": self.seconds, "exchange_seconds": self.exchange_seconds
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], step: int, rank: int, size: int) -> "Stretch":
        """As it was after `step`; where other ranks go on than began it, each with the mean of their losses."""
        stretch, losses = cls(int(fields["first_step"])), fields["losses"]
        stretch.steps = step - stretch.first_step
        stretch.losses = float(losses[rank]) if len(losses) == size else sum(losses) / len(losses)
        stretch.seconds, stretch.exchange_seconds = float(fields["seconds"]), float(fields["exchange_seconds"])
        return stretch
