"""Who looks on while a session trains: the command line, and whatever follows the filters' rankings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loft_hpc.models.scores import Scores
from loft_hpc.training.evaluation import Score
from loft_hpc.training.interruption import Interruption
from loft_hpc.training.settings import Supervision


class Watcher(Protocol):
    """Who is told of the progress: the command line, or nobody."""

    def prepared(self, epoch_images: int) -> None:
        """The data are there: images that all ranks together see in an epoch of a pretraining."""
        ...

    def started(self, path: str, total_steps: int, done_steps: int) -> None: ...

    def advanced(self, step: int, loss: float) -> None: ...

    def epoch_ended(self, epoch: int, epochs: int, loss: float, score: Score | None, distance: float | None, seconds: float) -> None: ...

    def stopped(self, epoch: float, epochs: int) -> None: ...

    def other_world_size(self, before: int, now: int) -> None: ...

    def fell_back(self, problem: str) -> None: ...

    def noted(self, text: str) -> None:
        """Something about the training that its user must know."""
        ...


@dataclass(frozen=True)
class Oversight:
    """Who looks on and looks after a training, from outside of it."""

    watcher: Watcher
    interruption: Interruption
    supervision: Supervision


@dataclass(frozen=True)
class Observation:
    """What an observer makes of a snapshot."""

    fields: Mapping[str, Any]
    """For the log; empty for a first snapshot, which there is nothing to compare with."""
    distance: float | None
    """Normalised filter distance to the snapshot before, meaned over the groups."""
    stop: bool
    """Whether the training may end here."""


class Observer(Protocol):
    """Follows the rankings of the filters from snapshot to snapshot; on rank 0 alone."""

    stop: bool
    """Whether the last snapshot that was seen said that the training may end."""

    def see(self, scores: Scores) -> Observation:
        """The next snapshot's scores."""
        ...
