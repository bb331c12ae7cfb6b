"""By the scale that normalisation gives a filter (Network Slimming), and the same at the epoch when it comes to rest (Early-Bird)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loft_hpc.errors import LoftError
from loft_hpc.filterwise.emergence import RULES, Emergence, Stopping
from loft_hpc.models.scores import BN_SCALE, score
from loft_hpc.runs.snapshots import point_of
from loft_hpc.tickets.finders.magnitude import SCOPES, chosen_filters, with_all_groups
from loft_hpc.tickets.masks import FilterMask
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.source import Source

FLOOR = 0.1
EMERGED = "emerged"


@dataclass(frozen=True)
class ScaleOptions:
    scope: str = option("global", "", SCOPES)
    floor: float = option(FLOOR, "")
    round_to: int = option(1, "")

    def __post_init__(self):
        check_choices(self)
        if not 0 <= self.floor < 1:
            raise LoftError(f"--floor {self.floor:g} must be 0 or more and below 1", usage=True)


def _label(options: Any) -> list[str]:
    return [] if options.scope == "global" else [options.scope]


def _tickets(source: Source, options: Any, ratios: Sequence[float], at: str) -> Iterator[Found]:
    state = source.state(at)
    scores = {group.name: score(state, group, BN_SCALE) for group in source.groups}
    if all(bool((values == values[0]).all()) for values in scores.values()):
        raise LoftError(f"all BatchNorm scales are alike at {at}, so nothing can be ranked by them: draw from a trained network with --at")
    for ratio in ratios:
        mask = FilterMask(source.architecture, chosen_filters(scores, source.groups, ratio, options))
        yield Found(ratio, mask, state, source.file(at), source.cost(at), with_all_groups(scores, mask), {"at": at})


@register("bn-scale", "the filters with the largest BatchNorm scales", ScaleOptions, label=_label)
def bn_scale(source: Source, options: ScaleOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """One threshold over all |BatchNorm weights| of the hidden filters (Liu et al. 2017, arXiv 1708.06519).

    Every block keeps a tenth of its filters (`--floor`), lest a network be cut through. The L1 penalty on the scales that the paper trains
    with is not part of our trainings.
    """
    yield from _tickets(source, options, ratios, source.at)


@dataclass(frozen=True)
class EarlyBirdOptions(ScaleOptions):
    tolerance: float = option(RULES["mask-distance"][0], "Share of entries in which masks may differ and count as stable.")
    patience: int = option(RULES["mask-distance"][1], "Snapshots whose masks the newest is compared with.")

    def __post_init__(self):
        super().__post_init__()
        Stopping(stability="mask-distance", tolerance=self.tolerance, patience=self.patience)


@register(
    "early-bird", "BatchNorm scales at the first snapshot where their mask is stable", EarlyBirdOptions,
    default_at=lambda options: EMERGED, label=_label,
)  # fmt: skip
def early_bird(source: Source, options: EarlyBirdOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """The first snapshot whose mask of |BatchNorm weights| is within `tolerance` of each of the `patience` before it (You et al. 2020,
    arXiv 1909.11957; facts: tickets.md), and the ticket of its scales.

    The run's own snapshots are read, each ratio by itself, so nothing is trained; the cost is the run's up to that snapshot. The paper's
    trainings are dense (`--strategy data-parallel`), but any run has scales to look at. Raises LoftError where no mask came to rest.
    """
    if source.at != EMERGED:
        raise LoftError("--method early-bird finds its snapshot itself: leave --at away", usage=True)
    for ratio in ratios:
        yield from _tickets(source, options, [ratio], _emergence(source, options, ratio))


def _emergence(source: Source, options: EarlyBirdOptions, ratio: float) -> str:
    """The first snapshot with the full network, from which on the masks are stable. Raises LoftError where there is none."""
    snapshots = source.run.snapshots
    stopping = Stopping(
        stop_when_stable=True, stability="mask-distance", stable_ratio=ratio, tolerance=options.tolerance, patience=options.patience
    )
    watching, steps = Emergence(stopping), snapshots.score_steps()
    full = {snapshots.step(name): name for name in snapshots.names()}
    for step in steps:
        if watching.see(snapshots.read_scores(step)).stop:
            later = [name for taken, name in sorted(full.items()) if taken >= step]
            if later:
                return point_of(later[0])
    looser = "raise --tolerance" if len(steps) > options.patience else f"lower --patience below {len(steps)} and raise --tolerance"
    raise LoftError(
        f"{source.run.path}: the masks of ratio {ratio:g} are not stable over {options.patience + 1} of its {len(steps)} snapshots: "
        f"train longer, take snapshots more often (--snapshot-every), or {looser}"
    )
