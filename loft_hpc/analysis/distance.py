"""The filter distance between two rankings of one layer's filters (LoFT's poster; facts: loft.md).

    F(sigma) = sum over i of (1/i) * | ln i - ln sigma(i) |

i: a filter's rank in the first ranking, from 1; sigma(i): the same filter's rank in the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, State

NORMS = {"l1": 1, "l2": 2}


def filter_norms(weight: Tensor, norm: str = "l2") -> np.ndarray:
    """Norm of every filter of a (C_out, C_in, K, K) weight, as (C_out,) float64."""
    return np.linalg.norm(weight.detach().double().cpu().numpy().reshape(len(weight), -1), ord=NORMS[norm], axis=1)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of every filter from 1, the largest score first; equal scores in the order of the filters' indices."""
    order = np.argsort(-scores, kind="stable")
    result = np.empty(len(scores), dtype=np.int64)
    result[order] = np.arange(1, len(scores) + 1)
    return result


def filter_distance(first: np.ndarray, second: np.ndarray) -> float:
    """F between two rankings, each the (n,) ranks of the same filters from 1. Zero iff they agree; not symmetric."""
    if first.shape != second.shape:
        raise ValueError(f"rankings of {len(first)} and of {len(second)} filters")
    return float(np.sum(np.abs(np.log(first) - np.log(second)) / first))


@cache
def expected_distance(filters: int) -> float:
    """E[F] when the second ranking is uniformly random: the mean over j of |ln i - ln j|, weighted by 1/i and summed over i.

    By symmetry sigma(i) is uniform over 1..n for each i, and expectation is linear. O(n^2) work and memory.
    """
    rank = np.arange(1, filters + 1)
    return float((np.abs(np.log(rank)[:, None] - np.log(rank)[None, :]).mean(axis=1) / rank).sum())


@dataclass(frozen=True)
class GroupDistance:
    """Distance between two networks' rankings of one group's filters."""

    group: str
    filters: int
    distance: float
    """F itself."""
    normalised: float
    """F over its expectation for a random second ranking: 0 for equal rankings, about 1 for unrelated ones."""


def network_distance(first: State, second: State, groups: Sequence[FilterGroup], norm: str = "l2") -> list[GroupDistance]:
    """The distance of every group's ranking in `first` (whose top filters weigh most) to that in `second`.

    Raises LoftError if the two do not have the same filters.
    """
    rows = []
    for group in groups:
        weights = [state.get(group.filters) for state in (first, second)]
        if any(weight is None for weight in weights) or len(weights[0]) != len(weights[1]):
            raise LoftError(f"the two networks do not have the same filters in {group.name}: compare networks of one shape")
        distance = filter_distance(*(ranks(filter_norms(weight, norm)) for weight in weights))
        expected = expected_distance(len(weights[0]))
        rows.append(GroupDistance(group.name, len(weights[0]), distance, distance / expected if expected else 0.0))
    return rows
