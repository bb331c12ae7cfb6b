"""Which ticket is wanted, and the finders that know how to make it.

A finder is a file in tickets/finders/ that registers a function; nothing else needs to know of it (docs/architecture.md has an example).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import MAX_CHANNELS, Architecture
from loft_hpc.tickets.masks import Mask, Scores
from loft_hpc.tickets.source import FINAL, Source
from loft_hpc.tickets.ticket import Cost
from loft_hpc.training.settings import MAX_SEED, refuse_outside


@dataclass(frozen=True)
class Found:
    """A ticket as its finder leaves it: the mask, and the network to take its weights from."""

    ratio: float
    mask: Mask
    weights: Mapping[str, Any]
    """State of the dense network to start from."""
    drawn_from: str
    """The file of that state, relative to the run."""
    cost: Cost
    scores: Scores | None = None
    """What the units were ranked by, laid out as the mask's tensors; None where they were not ranked."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else to tell of it."""


def always_final(options: Any) -> str:
    return FINAL


@dataclass(frozen=True)
class Finder:
    """A method of finding tickets."""

    name: str
    help: str
    options: type
    """Frozen dataclass of its options, validated where it is made. Each field is an option of `loft prune`: its default, and in its
    metadata `help` and perhaps `choices`."""
    find: Callable[[Source, Any, Sequence[float]], Iterator[Found]]
    """(source, options, pruning ratios) -> a ticket for each ratio, in their order. Called by all ranks alike."""
    default_at: Callable[[Any], str] = always_final
    """The network to draw from if the user names none."""
    label: Callable[[Any], Sequence[str]] = lambda options: ()
    """What tells tickets of this method apart by name, besides the ratio."""
    amount: Callable[[float, Architecture], str] = lambda ratio, dense: f"{ratio:g}"
    """How much is removed, as tickets are named by it: the ratio, or what that comes to where it is coarse."""
    removes_filters: Callable[[Any], bool] = lambda options: getattr(options, "unit", "filters") == "filters"
    """Whether its tickets are of filters, so that a choice of blocks means something."""
    shallower: Callable[[float, Architecture], Architecture] = lambda ratio, dense: dense
    """The network that is left where it removes whole blocks: as many, though which is not known before."""
    trainings: Callable[[Any, Architecture, Sequence[float]], int] = lambda options, dense, ratios: 0
    """How many trainings of the dense network it searches by, each of `search_epochs` or of the run's epochs."""


FINDERS: dict[str, Finder] = {}
"""By name; filled by the files in tickets/finders/."""


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A field of a finder's options."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def register(name: str, help: str, options: type, **details: Any) -> Callable[[Callable], Callable]:
    """Make a function the finder NAME."""

    def add(find: Callable) -> Callable:
        FINDERS[name] = Finder(name, help, options, find, **details)
        return find

    return add


def check_choices(options: Any) -> None:
    """For an options' `__post_init__`. Raises LoftError where a field is none of its choices, or no sensible seed or multiple."""
    for known in fields(options):
        value, choices = getattr(options, known.name), known.metadata.get("choices")
        if choices and value not in choices:
            raise LoftError(f"unknown {known.name.replace('_', ' ')} '{value}': choose one of {', '.join(choices)}", usage=True)
    if hasattr(options, "seed"):
        refuse_outside(options, seed=(0, MAX_SEED))
    multiple = getattr(options, "round_to", 1)
    if not 1 <= multiple <= MAX_CHANNELS:
        raise LoftError(f"--round-to {multiple} must lie between 1 and {MAX_CHANNELS}", usage=True)
    if multiple > 1 and getattr(options, "unit", "filters") != "filters":
        raise LoftError("--round-to counts filters: omit it with --unit weights", usage=True)


@dataclass(frozen=True)
class Pruning:
    """How much to remove, and by which method."""

    ratio: float
    """Pruning ratio: the share of hidden filters, of weights, or of removable blocks that is removed."""
    method: str = "magnitude"
    options: Any = None
    """Of the method; None for its defaults."""

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise LoftError(f"--ratio {self.ratio:g} must lie between 0 and 1: it is the share that is removed", usage=True)
        if self.method not in FINDERS:
            raise LoftError(f"unknown method '{self.method}': choose one of {', '.join(FINDERS)}", usage=True)
        if self.options is None:
            object.__setattr__(self, "options", self.finder.options())

    @property
    def finder(self) -> Finder:
        return FINDERS[self.method]

    @classmethod
    def of(cls, ratio: float, method: str = "magnitude", **options: Any) -> "Pruning":
        """With some of the method's options. Raises LoftError for options that belong to another method."""
        if method not in FINDERS:
            raise LoftError(f"unknown method '{method}': choose one of {', '.join(FINDERS)}", usage=True)
        known = FINDERS[method].options.__dataclass_fields__
        for name in options:
            if name not in known:
                owners = [finder.name for finder in FINDERS.values() if name in finder.options.__dataclass_fields__]
                raise LoftError(f"--{name.replace('_', '-')} belongs to --method {', '.join(owners)}, not to {method}", usage=True)
        return cls(ratio, method, FINDERS[method].options(**options))

    def to_json(self) -> dict[str, Any]:
        """Flat, as it stands in ticket.json."""
        return {"ratio": self.ratio, "method": self.method, **asdict(self.options)}


def all_options() -> dict[str, list[tuple[Finder, Field]]]:
    """Every option of every finder: those that have it, each with its field."""
    found: dict[str, list[tuple[Finder, Field]]] = {}
    for finder in FINDERS.values():
        for known in fields(finder.options):
            found.setdefault(known.name, []).append((finder, known))
    return found
