"""What filters are ranked by: norms of their weights, and the scale that normalisation gives them.

A network's scores map "CRITERION/GROUP", for instance "l2/layer2.1", to a (filters,) float32 tensor, larger being better. They are
what a cheap snapshot holds: a few kilobytes in place of the network.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, State

NORMS = {"l1": 1, "l2": 2}
BN_SCALE = "bn-scale"
"""|weight| of the normalisation on the hidden filters (Network Slimming, Early-Bird)."""
CRITERIA = (*NORMS, BN_SCALE)
_ROWS_AT_ONCE = 64

Scores = Mapping[str, Tensor]


def filter_norms(weight: Tensor, norm: str = "l2") -> Tensor:
    """Norm of every filter of a (C_out, C_in, K, K) weight, as (C_out,) float32 on the CPU.

    Summed in float64 and rounded to float32: the order of summation, which differs between machines, is lost in the rounding, so that
    every machine ranks alike.
    """
    rows = weight.detach().permute(0, *range(2, weight.dim()), 1).reshape(len(weight), -1)
    # A few filters at a time, so that their float64 copies stay in the cache.
    norms = [torch.linalg.vector_norm(part.double(), NORMS[norm], dim=1) for part in rows.split(_ROWS_AT_ONCE)]
    return torch.cat(norms).float().cpu()


def filter_scores(state: State, groups: Iterable[FilterGroup], criteria: Iterable[str] = CRITERIA) -> dict[str, Tensor]:
    """The scores of all groups whose filters `state` holds, by every criterion."""
    found = {}
    for group in groups:
        if group.filters in state:
            for criterion in criteria:
                found[f"{criterion}/{group.name}"] = score(state, group, criterion)
    return found


def score(state: State, group: FilterGroup, criterion: str) -> Tensor:
    """One group's scores by one criterion."""
    if criterion == BN_SCALE:
        return state[group.scale].detach().abs().float().cpu()
    return filter_norms(state[group.filters], criterion)


def by_group(scores: Scores, criterion: str) -> dict[str, np.ndarray]:
    """The scores by one criterion, under the groups' names, in forward order: files keep them in another one.

    Raises LoftError where one is not finite: nothing is ranked then.
    """
    prefix = f"{criterion}/"
    refuse_not_finite({name: tensor for name, tensor in scores.items() if name.startswith(prefix)})
    found = {name.removeprefix(prefix): tensor.numpy() for name, tensor in scores.items() if name.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: [int(number) for number in re.findall(r"\d{1,9}", item[0])]))


def refuse_not_finite(scores: Mapping[str, Tensor | np.ndarray]) -> None:
    """Raises LoftError, naming the first, where scores are not finite: they rank nothing, and a sort would hide it."""
    for name, values in scores.items():
        if not np.isfinite(np.asarray(values)).all():
            raise LoftError(
                f"the scores {name} are not finite, so nothing can be ranked by them: the network's weights are not finite or too large"
            )


def removed_count(filters: int, ratio: float) -> int:
    """Filters to remove out of `filters`: the ratio rounded down to whole filters, so never all of them."""
    return math.floor(round(ratio * filters, 9))  # 0.29 * 100 is 28.999999999999996


def removed_text(removed: float, asked: float) -> str:
    """The share of the units that is removed, and what was asked for where that is another one."""
    said, wished = f"{100 * removed:.4g} %", f"{100 * asked:.4g} %"
    return said if said == wished else f"{said} (asked {wished})"
