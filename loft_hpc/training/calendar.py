"""What falls due when: ends of epochs, evaluations, snapshots and checkpoints, in steps of a worker."""

from dataclasses import dataclass

from loft_hpc.training.interval import next_multiple, passes
from loft_hpc.training.settings import Checkpointing, Evaluation, Snapshots


@dataclass(frozen=True)
class Due:
    """What falls due in a stretch of steps. A round may end a little after something fell due, but nothing is left out."""

    epoch: bool
    """An epoch ends."""
    evaluation: bool
    snapshot: bool
    checkpoint: bool


@dataclass(frozen=True)
class Calendar:
    """Of one training. Where it ends everything falls due."""

    total_steps: int
    steps_per_epoch: int
    evaluation_steps: int
    snapshot_steps: int
    checkpoint_steps: int

    @classmethod
    def of(
        cls, total_steps: int, steps_per_epoch: int, evaluation: Evaluation, snapshots: Snapshots, checkpointing: Checkpointing
    ) -> "Calendar":
        return cls(
            total_steps, steps_per_epoch, evaluation.evaluate_every * steps_per_epoch, snapshots.every.steps(steps_per_epoch),
            checkpointing.every.steps(steps_per_epoch),
        )  # fmt: skip

    def due(self, begin: int, end: int) -> Due:
        """After step `begin` and not after step `end`."""
        every = (self.steps_per_epoch, self.evaluation_steps, self.snapshot_steps, self.checkpoint_steps)
        return Due(*(end >= self.total_steps or passes(begin, end, steps) for steps in every))

    def next(self, step: int) -> int:
        """The first step after `step` at which something falls due."""
        every = (self.steps_per_epoch, self.snapshot_steps, self.checkpoint_steps)
        return min(self.total_steps, *(next_multiple(step, steps) for steps in every if steps))
