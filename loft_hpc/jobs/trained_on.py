"""The data that a network on disk was trained on, against the data that it meets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loft_hpc.data.dataset import DataInfo
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.runs.run import Run

_LISTED = 3
_NAME_LENGTH = 60


@dataclass(frozen=True)
class TrainedOn:
    """What a network takes, and what its run says of the images that it saw."""

    where: Path
    """The run or ticket, for messages."""
    num_classes: int
    channels: int
    classes: tuple[str, ...] = ()
    """Names by label; empty where nothing says them: earlier versions, tars of numbered labels, a ticket outside of its run."""
    fingerprint: str | None = None
    """SHA-256 of `DataInfo`; None where nothing says it."""

    @classmethod
    def of(cls, where: Path, network: Architecture) -> "TrainedOn":
        """Of a run, or of a ticket in RUN/tickets, whose dense network is `network`: another network's run tells nothing of it."""
        home = where if (where / "run.json").is_file() else where.resolve().parent.parent
        try:
            run = Run.open(home)
            data = (run.description.get("data") or {}) if home == where or run.architecture == network else {}
        except LoftError:
            data = {}
        names, digest = data.get("classes"), data.get("fingerprint")
        known = isinstance(names, list) and len(names) == network.num_classes and all(isinstance(name, str) for name in names)
        return cls(
            where, network.num_classes, network.in_channels, tuple(names) if known else (), digest if isinstance(digest, str) else None
        )

    def refuse_other_channels(self, info: DataInfo) -> None:
        """Raises LoftError where the network cannot look at these images at all."""
        if info.channels != self.channels:
            raise LoftError(
                f"{info.name} has images of {_channels(info.channels)}, and the network of {self.where} takes {_channels(self.channels)}: "
                f"choose a data set of as many, or pretrain on {info.name}"
            )

    def other_classes(self, info: DataInfo) -> str | None:
        """How the classes of a data set differ, names first; None where they are the same, as far as is known."""
        counts = f"{info.num_classes} classes in place of {self.num_classes}"
        if not self.classes or not info.classes:
            return None if info.num_classes == self.num_classes else counts
        if self.classes == info.classes:
            return None
        added = [name for name in info.classes if name not in self.classes]
        gone = [name for name in self.classes if name not in info.classes]
        said = [f"{what} {_listed(names)}" for what, names in (("with", added), ("without", gone)) if names]
        return f"{counts}, {' and '.join(said) or 'the same in another order'}"


def meet(own: TrainedOn, info: DataInfo, continued: bool = False) -> str | None:
    """Let a network meet a data set with the classifier that it has; what is to be told of it, or None.

    Raises LoftError where the channels or classes are others: its outputs would mean something else. Other images of the same classes are
    worth a note; where a result is `continued`, which must come from one set of images, they are refused.
    """
    own.refuse_other_channels(info)
    difference = own.other_classes(info)
    if difference:
        raise LoftError(
            f"{own.where} was trained on other classes: this {info.name} has {difference}: give the --data-dir that it was trained on "
            "(loft retrain TICKET --dataset D makes a new classifier)"
        )
    if continued and info.fingerprint != own.fingerprint:
        raise LoftError(f"the images of {info.name} are not those that {own.where} was trained on: give its --data-dir")
    if own.fingerprint in (None, info.fingerprint):
        return None
    return f"{own.where} was trained on other images of the same classes than these of {info.name}"


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count > 1)}"


def _listed(names: Sequence[str]) -> str:
    """The first few."""
    shown = ", ".join(name[:_NAME_LENGTH] for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
