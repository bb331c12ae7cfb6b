"""By size: the filters with the largest norms, or the weights of the largest magnitude."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, Selection, State
from loft_hpc.models.scores import NORMS, filter_norms
from loft_hpc.tickets.counts import kept_of_each, largest, largest_of_all, rounded
from loft_hpc.tickets.masks import FilterMask, WeightMask, weight_shapes
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.source import Source

SCOPES = ("layer", "global")
UNITS = ("filters", "weights")
FILTER_FLOOR = 0.1


@dataclass(frozen=True)
class MagnitudeOptions:
    unit: str = option("filters", "Remove whole filters, which makes the network smaller, or single weights, which masks them.", UNITS)
    criterion: str = option("l2", "Norm of a filter's weights; the largest stay. A single weight has its absolute value.", tuple(NORMS))
    scope: str = option("layer", "The same ratio in every block (or layer of weights), or one ranking over all.", SCOPES)
    floor: float | None = option(
        None, f"Share that --scope global leaves every block at least; {FILTER_FLOOR} for filters and 0 for weights if not given."
    )

    round_to: int = option(
        1,
        "Round the filters that every layer keeps to the nearest multiple, at least one: widths that hardware computes well, for instance 8.",
    )

    def __post_init__(self):
        check_choices(self)
        if self.floor is None:
            object.__setattr__(self, "floor", FILTER_FLOOR if self.unit == "filters" else 0.0)
        if not 0 <= self.floor < 1:
            raise LoftError(f"--floor {self.floor:g} must be 0 or more and below 1", usage=True)


def largest_filters(state: State, groups: Sequence[FilterGroup], ratio: float, options: MagnitudeOptions | None = None) -> Selection:
    """Keep the filters with the largest norm (Li et al. 2017, arXiv 1608.08710); among equal norms the lower index.

    In the global scope a norm is divided by what it would be for as many weights of size 1 (l2: the root of their number, l1: their
    number), so that groups with larger filters have no head start; groups at their floor keep what they have left.
    """
    options = options or MagnitudeOptions()
    return chosen_filters(filter_scores_of(state, groups, options), groups, ratio, options)


def filter_scores_of(state: State, groups: Sequence[FilterGroup], options: MagnitudeOptions) -> dict[str, Tensor]:
    """(filters,) of each group, float64: what the filters are ranked by."""
    norms = {group.name: filter_norms(state[group.filters], options.criterion).double() for group in groups}
    if options.scope == "layer":
        return norms
    return {group.name: norms[group.name] / state[group.filters][0].numel() ** (1 / NORMS[options.criterion]) for group in groups}


def chosen_filters(scores: Mapping[str, Tensor], groups: Sequence[FilterGroup], ratio: float, options: Any) -> dict[str, Tensor]:
    """The filters of `groups` that stay, at least one of each group, by the `scope`, `floor` and `round_to` of a finder's options.

    One ranking over all says how many each group keeps, the floor included; that number is rounded, and the group's best are taken.
    """
    layers = {group.name: scores[group.name].numpy() for group in groups}
    widths = {name: len(values) for name, values in layers.items()}
    if options.scope == "global":
        counts = {name: len(kept) for name, kept in largest_of_all(layers, ratio, options.floor, 1, "filters").items()}
    else:
        counts = kept_of_each(widths, ratio, "filters")
    counts = rounded(counts, widths, options.round_to)
    return {name: torch.from_numpy(largest(values, counts[name])) for name, values in layers.items()}


def chosen_weights(scores: Mapping[str, Tensor], ratio: float, scope: str, floor: float) -> dict[str, Tensor]:
    """0/1 over the weights, given their scores: of every layer the same share, or one ranking over all."""
    layers = {name: tensor.double().flatten().numpy() for name, tensor in scores.items()}
    if scope == "global":
        kept = largest_of_all(layers, ratio, floor, 0, "weights")
    else:
        counts = kept_of_each({name: len(values) for name, values in layers.items()}, ratio, "weights")
        kept = {name: largest(values, counts[name]) for name, values in layers.items()}
    return {name: as_mask(kept[name], scores[name].shape) for name in layers}


def as_mask(kept: np.ndarray, shape: torch.Size) -> Tensor:
    """uint8 of `shape`, 1 at the flat indices `kept`."""
    return torch.zeros(shape.numel(), dtype=torch.uint8).index_fill(0, torch.from_numpy(kept), 1).view(shape)


def with_all_groups(scores: Mapping[str, Tensor], mask: FilterMask) -> dict[str, Tensor]:
    """float32 scores laid out as the mask: 0 for blocks that were not ranked, which keep all."""
    return {name: scores[name].float() if name in scores else torch.zeros(len(own)) for name, own in mask.tensors().items()}


def _label(options: Any) -> list[str]:
    unit = [] if options.unit == "filters" else [options.unit]
    criterion = [options.criterion] if options.unit == "filters" else []
    return [*unit, *criterion, *([] if options.scope == "layer" else [options.scope])]


@register("magnitude", "the filters with the largest norms, or the largest weights", MagnitudeOptions, label=_label)
def magnitude(source: Source, options: MagnitudeOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """Filters by their norm, or weights by their absolute value (Han et al. 2015, arXiv 1506.02626)."""
    state = source.state(source.at)
    common = (state, source.file(source.at), source.cost(source.at))
    if options.unit == "weights":
        scores = {name: state[name].abs() for name in weight_shapes(source.architecture)}
        for ratio in ratios:
            yield Found(
                ratio, WeightMask(source.architecture, chosen_weights(scores, ratio, options.scope, options.floor)), *common, scores
            )
        return
    scores = filter_scores_of(state, source.groups, options)
    for ratio in ratios:
        mask = FilterMask(source.architecture, chosen_filters(scores, source.groups, ratio, options))
        yield Found(ratio, mask, *common, with_all_groups(scores, mask))
