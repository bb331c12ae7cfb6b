"""Dealing the hidden filters to the workers, anew every round."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup

Deal = list[dict[str, Tensor]]
"""One selection for each worker; together they hold every filter of every partitioned group exactly once."""


def check_workers(groups: Sequence[FilterGroup], workers: int) -> None:
    """Raises LoftError if some worker would hold no filter of a group, or if there is nothing to deal."""
    if not groups:
        raise LoftError("this model has no blocks that this rule partitions: use --partition all-blocks")
    narrowest = min(groups, key=lambda group: group.width)
    if workers > narrowest.width:
        raise LoftError(f"{workers} ranks cannot share the {narrowest.width} filters of {narrowest.name}: start at most {narrowest.width}")


def deal(groups: Sequence[FilterGroup], workers: int, seed: int, round_number: int) -> Deal:
    """A uniformly random deal of every group to the workers (LoFT, section 3; release: `sample_filter_indices`).

    Every rank computes the same one from (seed, round), so that no index is ever sent. A worker's indices are sorted: its
    sub-network keeps the full network's order of channels, and one worker alone holds the full network itself.
    """
    draw = np.random.default_rng(seeds.derive(seed, "deal", round_number))
    hands: Deal = [{} for _ in range(workers)]
    for group in groups:
        permutation = torch.from_numpy(draw.permutation(group.width))
        for hand, filters in zip(hands, permutation.split(group.shares(workers)), strict=True):
            hand[group.name] = filters.sort().values
    return hands


def leaving(old: Deal, new: Deal, rank: int, groups: Sequence[FilterGroup]) -> list[dict[str, Tensor]]:
    """What rank holds in the old deal, by the worker that holds it in the new one (its own part included)."""
    return _by_holder(old[rank], new, groups)


def arriving(old: Deal, new: Deal, rank: int, groups: Sequence[FilterGroup]) -> list[dict[str, Tensor]]:
    """What rank holds in the new deal, by the worker that held it in the old one: `leaving` of the others, turned round."""
    return _by_holder(new[rank], old, groups)


def _by_holder(hand: dict[str, Tensor], holders: Deal, groups: Sequence[FilterGroup]) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{} for _ in holders]
    for group in groups:
        holder = torch.empty(group.width, dtype=torch.int64)
        for worker, filters in enumerate(holders):
            holder[filters[group.name]] = worker
        mine = hand[group.name]
        for worker, part in enumerate(parts):
            part[group.name] = mine[holder[mine] == worker]
    return parts
