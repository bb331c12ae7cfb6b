"""Exact numbers: how many units of each layer stay, and which, given their scores.

A layer is any named set of units: the filters of a block, the weights of a convolution. Scores are (units,) numpy arrays, larger being
better; of equal scores the lower index stays, so that a count is met whatever the scores are.
"""

import math
from collections.abc import Mapping

import numpy as np

from loft_hpc.errors import LoftError
from loft_hpc.models.scores import refuse_not_finite, removed_count

Layers = Mapping[str, np.ndarray]
ROUNDS_TO_NOTHING = 0.5


def kept_count(units: int, ratio: float) -> int:
    """Units of a layer that stay: the ratio of removed ones is rounded down to whole units, so never none."""
    return units - removed_count(units, ratio)


def kept_of_each(sizes: Mapping[str, int], ratio: float, what: str) -> dict[str, int]:
    """The same ratio in every layer. Raises LoftError where less than half a unit (`what`) of a layer would be left; a single one stays."""
    vanishing = [name for name, units in sizes.items() if units > 1 and round(units * (1 - ratio), 9) < ROUNDS_TO_NOTHING]
    if vanishing:
        smallest = min(vanishing, key=lambda name: sizes[name])
        raise _too_small(ratio, smallest, f"has {sizes[smallest]} {what}", ROUNDS_TO_NOTHING / sizes[smallest])
    return {name: kept_count(units, ratio) for name, units in sizes.items()}


def kept_of_all(sizes: Mapping[str, int], ratio: float, what: str, weakest: str | None = None, needed: int = 0) -> int:
    """One count over all layers, in which there is at least one unit for each. Raises LoftError where there is not.

    `weakest`: the layer that would be the first to lose all; by default the smallest. `needed`: how many must stay for other reasons, so
    that the ratio advised leaves those too.
    """
    total = sum(sizes.values())
    keep = kept_count(total, ratio)
    if keep < len(sizes):
        name = weakest or min(sizes, key=lambda name: sizes[name])
        why = f"is one of {len(sizes)} layers with {total} {what} together, of which {keep} stay"
        raise _too_small(ratio, name, why, max(len(sizes), needed) / total)
    return keep


def _too_small(ratio: float, name: str, why: str, smallest: float) -> LoftError:
    most = _largest_ratio(smallest)
    return LoftError(
        f"density {1 - ratio:.4g} (--ratio {ratio:.10g}) is too small for this network: {name}, which {why}, would vanish; "
        f"the smallest density possible is {1 - most:.4g}: give --ratio {most:.10g} or less"
    )


def _largest_ratio(density: float) -> float:
    """The pruning ratio that leaves this density, rounded down to four digits of the density: what is advised must work."""
    digits = 3 - math.floor(math.log10(density))
    return math.floor((1 - density) * 10**digits) / 10**digits


def least_ratio(units: int) -> str:
    """The smallest pruning ratio that removes one of the units, rounded up to four digits."""
    return f"{math.ceil(10_000 / units) / 10_000:.4f}"


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the `count` largest. Raises LoftError where a score is not finite."""
    refuse_not_finite({"of a layer": scores})
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def rounded(counts: Mapping[str, int], widths: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Counts as multiples of `multiple`: the nearest, of two equally near the larger, at least one multiple and at most the layer.

    A layer whose width is no multiple is kept whole where the nearest one exceeds it. Larger counts never become smaller ones, so what is
    nested stays nested. Raises LoftError where a layer has fewer filters than one multiple, and where nothing would be removed any more.
    """
    if multiple == 1:
        return dict(counts)
    narrowest = min(counts, key=lambda name: widths[name])
    if widths[narrowest] < multiple:
        raise LoftError(
            f"--round-to {multiple} is more than the {widths[narrowest]} filters of {narrowest}: give --round-to {widths[narrowest]} or less",
            usage=True,
        )
    made = {name: min(widths[name], multiple * max(1, (2 * count + multiple) // (2 * multiple))) for name, count in counts.items()}
    if all(made[name] == widths[name] for name in made) and any(counts[name] < widths[name] for name in made):
        raise LoftError(
            f"--round-to {multiple} leaves every layer whole at this --ratio: remove more, or give a smaller multiple", usage=True
        )
    return made


def largest_of_all(layers: Layers, ratio: float, floor: float, at_least: int, what: str) -> dict[str, np.ndarray]:
    """Sorted indices of what stays of every layer when one ranking is made over all of them.

    `floor` is the share of its units that every layer keeps in any case, rounded up, and `at_least` their least number.
    """
    refuse_not_finite(layers)
    sizes = {name: len(scores) for name, scores in layers.items()}
    weakest = min(layers, key=lambda name: float(layers[name].max()))
    floors = {name: max(at_least, math.ceil(round(floor * units, 9))) for name, units in sizes.items()}
    needed = sum(floors.values())
    keep = kept_of_all(sizes, ratio, what, weakest, needed)
    if needed > keep:
        raise LoftError(
            f"--ratio {ratio:g} keeps {keep} of {sum(sizes.values())} {what}, but the floors of the layers need {needed} "
            f"(of {weakest}, which would lose most, {floors[weakest]}): lower --floor, or give --ratio {_largest_ratio(needed / sum(sizes.values())):.10g} or less"
        )
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    together = np.concatenate(list(layers.values())).astype(np.float64)
    safe = [starts[name] + largest(scores, floors[name]) for name, scores in layers.items() if floors[name]]
    chosen = np.zeros(len(together), dtype=bool)
    if safe:
        chosen[np.concatenate(safe)] = True
    order = np.argsort(-together, kind="stable")
    chosen[order[~chosen[order]][: keep - needed]] = True
    return {name: np.flatnonzero(chosen[starts[name] : starts[name] + units]) for name, units in sizes.items()}
