"""Ways to choose the filters that stay."""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch

from loft_hpc import seeds
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, Selection, State
from loft_hpc.models.scores import NORMS, filter_norms, removed_count

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Pruning:
    """How much to remove, and by what."""

    ratio: float
    """Pruning ratio: the share of hidden filters removed."""
    method: str = "magnitude"
    criterion: str = "l2"
    """Norm of a filter's weights, for `magnitude`."""
    scope: str = "layer"
    """`layer`: the same ratio in every group. `global`: one ranking over all groups."""
    floor: float = 0.1
    """Share of its filters that `global` leaves in every group at least (one filter in any case)."""
    seed: int = 0
    """For `random`."""

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise LoftError(f"--ratio {self.ratio:g} must lie between 0 and 1: it is the share of filters removed", usage=True)
        if self.method not in FINDERS:
            raise LoftError(f"unknown method '{self.method}': choose one of {', '.join(FINDERS)}", usage=True)
        if self.criterion not in NORMS:
            raise LoftError(f"unknown criterion '{self.criterion}': choose one of {', '.join(NORMS)}", usage=True)
        if self.scope not in SCOPES:
            raise LoftError(f"unknown scope '{self.scope}': choose one of {', '.join(SCOPES)}", usage=True)
        if not 0 <= self.floor < 1:
            raise LoftError(f"--floor {self.floor:g} must be 0 or more and below 1", usage=True)
        if self.seed < 0:
            raise LoftError(f"--seed {self.seed} must be 0 or more", usage=True)


def magnitude(state: State, groups: Sequence[FilterGroup], pruning: Pruning) -> Selection:
    """Keep the filters with the largest norm (Li et al. 2017, arXiv 1608.08710); among equal norms the lower index.

    In the global scope a norm is divided by what it would be for as many weights of size 1 (l2: the root of their number, l1: their
    number), so that groups with larger filters have no head start; groups at their floor keep what they have left.
    """
    norms = {group.name: filter_norms(state[group.filters], pruning.criterion).double().numpy() for group in groups}
    if pruning.scope == "layer":
        return {group.name: _largest(norms[group.name], group.width - removed_count(group.width, pruning.ratio)) for group in groups}
    scores = {group.name: norms[group.name] / state[group.filters][0].numel() ** (1 / NORMS[pruning.criterion]) for group in groups}
    return _global(scores, groups, pruning)


def random(state: State, groups: Sequence[FilterGroup], pruning: Pruning) -> Selection:
    """Keep as many filters of each group as `magnitude` in the layer scope would, drawn uniformly."""
    if pruning.scope != "layer":
        raise LoftError("random tickets have the same ratio in every group: leave --scope global away", usage=True)
    counts = {group.name: range(group.width - removed_count(group.width, pruning.ratio)) for group in groups}
    return draw_like(counts, groups, pruning.seed)


def draw_like(like: Mapping[str, Sized], groups: Sequence[FilterGroup], seed: int) -> Selection:
    """As many filters of every group as `like` has, drawn uniformly."""
    draw = np.random.default_rng(seeds.derive(seed, "ticket"))
    return {group.name: torch.from_numpy(np.sort(draw.permutation(group.width)[: len(like[group.name])])) for group in groups}


def _largest(scores: np.ndarray, count: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(-scores, kind="stable")[:count]))


def _global(scores: dict[str, np.ndarray], groups: Sequence[FilterGroup], pruning: Pruning) -> Selection:
    total = sum(group.width for group in groups)
    keep = total - removed_count(total, pruning.ratio)
    floors = {group.name: max(1, math.ceil(round(pruning.floor * group.width, 9))) for group in groups}
    if sum(floors.values()) > keep:
        raise LoftError(
            f"--ratio {pruning.ratio:g} keeps {keep} of {total} filters, but the floors of the groups need {sum(floors.values())}: "
            "lower --floor or the ratio"
        )
    safe = {group.name: _largest(scores[group.name], floors[group.name]).numpy() for group in groups}
    others = [
        (-scores[group.name][index], number, index)
        for number, group in enumerate(groups)
        for index in np.setdiff1d(np.arange(group.width), safe[group.name])
    ]
    chosen = {name: list(indices) for name, indices in safe.items()}
    for _, number, index in sorted(others)[: keep - sum(floors.values())]:
        chosen[groups[number].name].append(index)
    return {name: torch.from_numpy(np.sort(np.array(indices))) for name, indices in chosen.items()}


Finder = Callable[[State, Sequence[FilterGroup], Pruning], Selection]

FINDERS: dict[str, Finder] = {"magnitude": magnitude, "random": random}
"""Finders by name: (state of the full network, groups to prune, pruning) -> kept filters of each group."""
