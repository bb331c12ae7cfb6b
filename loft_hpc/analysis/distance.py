"""The filter distance between two rankings of one layer's filters (LoFT's poster; facts: loft.md).

    F(sigma) = sum over i of (1/i) * | ln i - ln sigma(i) |

n: filters of the layer; i: a filter's rank in the first ranking, from 1; sigma(i): the same filter's rank in the second. In view of a
ticket that keeps the k top filters of the first ranking the sum runs to k only.

Expectation for a uniformly random second ranking: sigma(i) is then uniform over 1..n for every i, and expectation is linear, so

    E[F] = sum over i of (1/i) * A(i) / n,        A(i) = sum over j of | ln i - ln j |

Splitting A at j = i, with L(i) = ln 1 + ... + ln i, gives A(i) = (i ln i - L(i)) + (L(n) - L(i) - (n - i) ln i): O(n) altogether.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.groups import FilterGroup, State
from loft_hpc.models.scores import removed_count, score


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of every filter from 1, the largest score first; equal scores in the order of the filters' indices."""
    order = np.argsort(-scores, kind="stable")
    result = np.empty(len(scores), dtype=np.int64)
    result[order] = np.arange(1, len(scores) + 1)
    return result


def filter_distance(first: np.ndarray, second: np.ndarray, top: int | None = None) -> float:
    """F between two rankings, each the (n,) ranks of the same filters from 1; over the `top` filters of the first alone, if given.

    Zero iff they agree (on those filters); not symmetric.
    """
    if first.shape != second.shape:
        raise ValueError(f"rankings of {len(first)} and of {len(second)} filters")
    logarithms, weights, _ = _tables(len(first))
    terms = weights[first - 1] * np.abs(logarithms[first - 1] - logarithms[second - 1])
    return float(terms.sum() if top is None else terms[first <= top].sum())


def expected_distance(filters: int, top: int | None = None) -> float:
    """E[F] when the second ranking is uniformly random. O(n), computed once for each number of filters."""
    return float(_tables(filters)[2][: filters if top is None else top].sum())


@cache
def _tables(filters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln i, 1/i and E[term i], each (n,)."""
    rank = np.arange(1, filters + 1)
    logarithm = np.log(rank)
    sums = np.cumsum(logarithm)
    total = sums[-1] if filters else 0.0
    spread = (rank * logarithm - sums) + (total - sums - (filters - rank) * logarithm)
    return logarithm, 1 / rank, spread / filters / rank


@dataclass(frozen=True)
class GroupDistance:
    """Distance between two networks' rankings of one group's filters."""

    group: str
    filters: int
    distance: float
    """F itself."""
    normalised: float
    """F over its expectation for a random second ranking: 0 for equal rankings, about 1 for unrelated ones."""


def score_distance(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], ratio: float = 0.0) -> list[GroupDistance]:
    """The distance of every group's ranking by the scores `first` (whose top filters weigh most) to that by `second`.

    Both map a group's name to the (filters,) scores. With a pruning `ratio` only the filters that it leaves count, and the
    expectation is that of the same sum. Raises LoftError if the two do not have the same filters.
    """
    rows = []
    for name, scores in first.items():
        if name not in second or len(second[name]) != len(scores):
            raise LoftError(f"the two networks do not have the same filters in {name}: compare networks of one shape")
        count = len(scores)
        top = count - removed_count(count, ratio) if ratio else None
        distance = filter_distance(ranks(scores), ranks(second[name]), top)
        expected = expected_distance(count, top)
        rows.append(GroupDistance(name, count, distance, distance / expected if expected else 0.0))
    return rows


def mean_normalised(distances: Sequence[GroupDistance]) -> float:
    """Mean over the groups of the normalised distance."""
    return sum(row.normalised for row in distances) / len(distances)


def network_distance(first: State, second: State, groups: Sequence[FilterGroup], norm: str = "l2") -> list[GroupDistance]:
    """`score_distance` of two networks, ranked by a norm. Raises LoftError if they do not have the same filters."""
    return score_distance(*(_norms(state, groups, norm) for state in (first, second)))


def _norms(state: Mapping[str, Tensor], groups: Sequence[FilterGroup], norm: str) -> dict[str, np.ndarray]:
    for group in groups:
        if group.filters not in state:
            raise LoftError(f"one of the two networks has no {group.name}: compare networks of one shape")
    return {group.name: score(state, group, norm).numpy() for group in groups}


def global_mask(scores: Mapping[str, np.ndarray], ratio: float) -> np.ndarray:
    """Which filters stay when the share `ratio` of all of them, with the smallest scores over all groups, is removed.

    Early-Bird's mask: one threshold over the whole network (facts: tickets.md). As (all filters,) bool, group after group; an exact
    number is removed, of equal scores those that stand last.
    """
    together = np.concatenate(list(scores.values()))
    keep = len(together) - removed_count(len(together), ratio)
    mask = np.zeros(len(together), dtype=bool)
    mask[np.argsort(-together, kind="stable")[:keep]] = True
    return mask


def mask_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Share of entries that differ between two masks (Early-Bird's distance): 0 to 1."""
    return float(np.mean(first != second))
