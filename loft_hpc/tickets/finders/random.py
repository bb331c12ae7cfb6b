"""By chance: what every other method has to beat."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loft_hpc import seeds
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, Selection
from loft_hpc.tickets.counts import kept_of_all, kept_of_each, rounded
from loft_hpc.tickets.finders.magnitude import SCOPES, UNITS, as_mask
from loft_hpc.tickets.masks import FilterMask, WeightMask, weight_shapes
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.source import Source

PROFILES = ("uniform", "smart-ratio")
LAST_LAYER = 0.3
"""What smart ratios leave of the classifier."""


@dataclass(frozen=True)
class RandomOptions:
    unit: str = option("filters", "", UNITS)
    scope: str = option("layer", "", SCOPES)
    profile: str = option(
        "uniform",
        "Densities of the layers of --unit weights: the same everywhere, or smart-ratio: falling with depth as (L-l+1)^2 + (L-l+1), the "
        f"classifier's {LAST_LAYER}.",
        PROFILES,
    )
    seed: int = option(0, "What a random ticket (or search) is drawn by.")
    round_to: int = option(1, "")

    def __post_init__(self):
        check_choices(self)
        if self.scope != "layer":
            raise LoftError("random tickets have a ratio for every layer: leave --scope global away", usage=True)
        if self.profile != "uniform" and self.unit != "weights":
            raise LoftError("--profile smart-ratio is one of weights: give --unit weights with it", usage=True)


def random_filters(groups: Sequence[FilterGroup], ratio: float, seed: int, round_to: int = 1) -> Selection:
    """Keep as many filters of each group as `magnitude` in the layer scope would, drawn uniformly."""
    widths = {group.name: group.width for group in groups}
    counts = rounded(kept_of_each(widths, ratio, "filters"), widths, round_to)
    return draw_like({name: range(count) for name, count in counts.items()}, groups, seed)


def draw_like(like: Mapping[str, Sized], groups: Sequence[FilterGroup], seed: int) -> Selection:
    """As many filters of every group as `like` has, drawn uniformly."""
    draw = np.random.default_rng(seeds.derive(seed, "ticket"))
    return {group.name: torch.from_numpy(np.sort(draw.permutation(group.width)[: len(like[group.name])])) for group in groups}


def smart_ratios(sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """How many weights of each layer stay under smart ratios (Su et al. 2020, arXiv 2009.11094; facts: tickets.md), `keep` altogether.

    Layer l of L (from 1, in forward order) keeps a density in proportion to (L-l+1)^2 + (L-l+1), at most all of it; the classifier keeps
    30 %, or its even share of the weights that stay where that is less, or more where all others are full. At least one weight of every layer stays.
    """
    names, last = list(sizes), list(sizes)[-1]
    counts = {last: max(1, min(round(LAST_LAYER * sizes[last]), keep // len(names)))}
    wanted = {name: float((len(names) - place) ** 2 + (len(names) - place)) for place, name in enumerate(names)}
    free, left = [name for name in names if name != last], keep - counts[last]
    scale = 0.0
    while free:  # layers that are full hand on what is left to the others
        scale = left / sum(wanted[name] * sizes[name] for name in free)
        full = [name for name in free if wanted[name] * scale >= 1]
        if not full:
            break
        for name in full:
            counts[name] = sizes[name]
            left -= sizes[name]
            free.remove(name)
    if not free:
        counts[last] += left
        return {name: counts[name] for name in names}
    exact = {name: wanted[name] * scale * sizes[name] for name in free}
    counts |= {name: max(1, int(value)) for name, value in exact.items()}
    rest = keep - sum(counts.values())
    order = sorted(free, key=lambda name: int(exact[name]) - exact[name])
    while rest:  # largest remainders first; where the ones and not the remainders exceed the sum, the largest layers give
        name = order[0] if rest > 0 else max(free, key=lambda name: counts[name])
        counts[name] += 1 if rest > 0 else -1
        order = [*order[1:], *order[:1]]
        rest -= 1 if rest > 0 else -1
    return {name: counts[name] for name in names}


def even_counts(sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """How many units of each layer stay at equal densities, `keep` altogether and at least one of each: largest remainders."""
    share = keep / sum(sizes.values())
    counts = {name: min(units, max(1, int(share * units))) for name, units in sizes.items()}
    order = sorted(sizes, key=lambda name: int(share * sizes[name]) - share * sizes[name])
    place = 0
    while (rest := keep - sum(counts.values())) != 0:
        name = order[place % len(order)] if rest > 0 else max(counts, key=lambda name: counts[name])
        counts[name] += (counts[name] < sizes[name]) if rest > 0 else -1
        place += 1
    return counts


def _label(options: Any) -> list[str]:
    unit = [] if options.unit == "filters" else [options.unit]
    return [*unit, *([] if options.profile == "uniform" else [options.profile]), f"seed{options.seed}"]


@register("random", "drawn uniformly, as many of every layer", RandomOptions, label=_label)
def random(source: Source, options: RandomOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """Random tickets of equal density per layer, or of smart ratios."""
    state = source.state(source.at)
    common = (state, source.file(source.at), source.cost(source.at))
    for ratio in ratios:
        if options.unit == "filters":
            yield Found(
                ratio, FilterMask(source.architecture, random_filters(source.groups, ratio, options.seed, options.round_to)), *common
            )
            continue
        shapes = weight_shapes(source.architecture)
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        counts = (
            smart_ratios(sizes, kept_of_all(sizes, ratio, "weights"))
            if options.profile == "smart-ratio"
            else kept_of_each(sizes, ratio, "weights")
        )
        draw = np.random.default_rng(seeds.derive(options.seed, "ticket"))
        kept = {name: as_mask(draw.permutation(sizes[name])[: counts[name]], shapes[name]) for name in shapes}
        yield Found(ratio, WeightMask(source.architecture, kept), *common)
