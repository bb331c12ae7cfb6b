"""What accuracies over several seeds say about a ticket, and how many seeds would settle what they leave open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loft_hpc.analysis.statistics import mean_interval, student

TICKET, DENSE = "ticket", "dense"
WINNING, BETTER, NO_BETTER, INCONCLUSIVE = "winning", "better than random", "no better than random", "inconclusive"
YES, NO, OPEN = "yes", "no", "open"
MOST_SEEDS = 1000
RULE = (
    "better than random: ahead of every control; winning: also at most --xi points behind the dense network; "
    "no better than random: for sure less than --xi points ahead of one of them; inconclusive: anything else. "
    "Each at 95 % confidence, from differences seed by seed"
)


@dataclass(frozen=True)
class Comparison:
    """The ticket beside the dense network or one control."""

    name: str
    advantage: float
    """Of the ticket, percentage points, mean over the seeds."""
    half_width: float
    """Of its 95 % interval; not a number for one seed."""
    passed: str
    """`yes`, `no`, or `open` where the interval holds both."""
    seeds_needed: int | None
    """How many seeds would settle it, if mean and spread stay as they are; None where it is settled, where one seed shows no
    spread, or beyond MOST_SEEDS."""


@dataclass(frozen=True)
class Verdict:
    name: str
    why: str
    comparisons: Sequence[Comparison]

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would settle all that is open; None where nothing is, or where that cannot be said."""
        needed = [one.seeds_needed for one in self.comparisons if one.passed == OPEN]
        return None if not needed or None in needed else max(needed)


def judge(accuracies: Mapping[str, Sequence[float]], xi: float) -> Verdict:
    """The verdict by `RULE`, from accuracies (0 to 1) of the ticket, the dense network and the controls, by name and seed.

    `xi`: percentage points that make no difference. With one seed everything is open.
    """
    own, seeds = accuracies[TICKET], len(accuracies[TICKET])
    comparisons = [_compare(name, own, values, xi) for name, values in accuracies.items() if name != TICKET]
    dense = next(one for one in comparisons if one.name == DENSE)
    controls = [one for one in comparisons if one is not dense]
    beside_dense = {
        YES: f"at most {xi:g} points behind the dense network",
        NO: f"more than {xi:g} points behind the dense network",
        OPEN: f"whether at most {xi:g} points behind the dense network is open ({_to_settle([dense], seeds)})",
    }[dense.passed]
    lost, unsettled = ([one for one in controls if one.passed == outcome] for outcome in (NO, OPEN))
    if lost:
        said = f"not ahead of {_names(lost)} by {xi:g} points"
        if unsettled:
            said += f"; of {_names(unsettled)}: open ({_to_settle(unsettled, seeds)})"
        return Verdict(NO_BETTER, f"{said}; {beside_dense}", comparisons)
    if unsettled:
        return Verdict(
            INCONCLUSIVE, f"whether ahead of {_names(unsettled)} is open ({_to_settle(unsettled, seeds)}); {beside_dense}", comparisons
        )
    name = WINNING if dense.passed == YES else BETTER
    return Verdict(name, f"ahead of every control; {beside_dense}", comparisons)


def _compare(name: str, own: Sequence[float], other: Sequence[float], xi: float) -> Comparison:
    differences = [100 * (mine - theirs) for mine, theirs in zip(own, other, strict=True)]
    mean, half = mean_interval(differences)
    if name == DENSE:
        yes, no, distance = mean - half >= -xi, mean + half < -xi, abs(mean + xi)
    else:
        yes, no, distance = mean - half > 0, mean + half < xi, max(mean, xi - mean)
    passed = YES if yes else NO if no else OPEN
    needed = _seeds_for(differences, distance) if passed == OPEN else None
    return Comparison(name, mean, half, passed, needed)


def _seeds_for(differences: Sequence[float], distance: float) -> int | None:
    """The smallest number of seeds whose 95 % interval is narrower than `distance` on either side of the mean."""
    if len(differences) < 2:
        return None
    counts = np.arange(2, MOST_SEEDS + 1)
    half_widths = student(0.95, counts - 1) * np.std(differences, ddof=1) / np.sqrt(counts)
    enough = counts[half_widths < distance]
    return max(int(enough[0]), len(differences) + 1) if len(enough) else None


def _to_settle(open_ones: Sequence[Comparison], seeds: int) -> str:
    if seeds < 2:
        return "one seed shows no spread: give --seeds 3 or more"
    needed = [one.seeds_needed for one in open_ones]
    return f"more than {MOST_SEEDS} seeds" if None in needed else f"about {max(needed)} seeds would settle it"


def _names(comparisons: Sequence[Comparison]) -> str:
    return ", ".join(one.name for one in comparisons)
