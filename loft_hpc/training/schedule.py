"""The learning rate of every step of a training."""

import math
from dataclasses import dataclass

from loft_hpc.errors import LoftError
from loft_hpc.training.interval import Interval
from loft_hpc.training.settings import Optimisation


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step, of one training."""

    optimisation: Optimisation
    total_steps: int
    """Steps that the training has of its own."""
    steps_per_epoch: int
    skipped_steps: int = 0
    """Steps of the schedule that lie before the training's first one, where it begins in the schedule's middle."""

    def __post_init__(self):
        first = self._periods[1] if len(self._periods) > 1 else self.skipped_steps + self.total_steps
        if self.warmup_steps >= first:
            raise LoftError(
                f"--warmup {self.optimisation.warmup} is {self.warmup_steps:,} steps, and the schedule has {first:,}: "
                "shorten the warm-up, or train for more epochs",
                usage=True,
            )

    @property
    def warmup_steps(self) -> int:
        return Interval.parse(self.optimisation.warmup, "--warmup").steps(self.steps_per_epoch)

    @property
    def _periods(self) -> list[int]:
        """The steps at which the schedule begins: 0, and wherever a finished training was extended."""
        return [0, *(epoch * self.steps_per_epoch for epoch in self.optimisation.restarts)]

    def lr_at(self, step: int) -> float:
        """Learning rate of the training's step number `step`, counted from 0.

        During the warm-up it rises linearly, lr * (step + 1) / warmup. `cosine` falls over what remains of the schedule after the warm-up;
        `step` lowers the rate at its milestones, fractions of the whole schedule.
        """
        rule, position = self.optimisation, step + self.skipped_steps
        warmup = self.warmup_steps
        if position < warmup:
            return rule.lr * (position + 1) / warmup
        begins = self._periods
        begin = max(start for start in begins if start <= position)
        end = min((start for start in begins if start > begin), default=self.skipped_steps + self.total_steps)
        done, length = position - begin, end - begin
        if rule.schedule == "cosine":
            rising = warmup if begin == 0 else 0
            return rule.lr * 0.5 * (1 + math.cos(math.pi * (done - rising) / (length - rising)))
        if rule.schedule == "step":
            return rule.lr * rule.decay ** sum(done >= fraction * length for fraction in rule.milestones)
        return rule.lr
