"""What accuracies over seeds say: the verdicts of `loft check`, and whether a pretraining could have stopped earlier."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from loft_hpc.analysis.statistics import difference_interval, mean_interval
from loft_hpc.jobs.leaders import leaders
from loft_hpc.jobs.stops import Saved, earliest_stops, stop_sentence
from loft_hpc.jobs.sweep import Point
from loft_hpc.jobs.verdicts import BETTER, INCONCLUSIVE, NO_BETTER, WINNING, judge

XI = 1.0


def accuracies(dense: float, *controls: float, spread: float = 0.05, seeds: int = 3) -> dict[str, list[float]]:
    """Networks that stay behind the ticket by so many points; differences vary by `spread` points from seed to seed."""
    waves = np.linspace(-1, 1, seeds) * spread
    behind = {"dense": dense} | {f"control{number}": value for number, value in enumerate(controls)}
    return {"ticket": [0.9] * seeds} | {name: [0.9 - (value + wave) / 100 for wave in waves] for name, value in behind.items()}


@pytest.mark.parametrize(
    ("dense", "controls", "spread", "verdict"),
    [
        # ahead of all controls, and of the dense network or surely at most a point behind it
        (0.0, (5.0, 5.0), 0.05, WINNING),
        (-0.8, (5.0, 5.0), 0.05, WINNING),
        (+3.0, (0.2, 5.0), 0.05, WINNING),
        # surely more than a point behind it, or perhaps
        (-5.0, (5.0, 5.0), 0.05, BETTER),
        (-1.0, (5.0, 5.0), 0.05, BETTER),
        (-0.5, (5.0, 5.0), 1.0, BETTER),
        # one control that it surely does not lead by a point is enough, whatever the others and the dense network
        (0.0, (5.0, 0.0), 0.05, NO_BETTER),
        (0.0, (5.0, -20.0), 0.05, NO_BETTER),
        (-9.0, (-20.0, -20.0), 0.05, NO_BETTER),
        (0.0, (5.0, 0.05), 0.05, NO_BETTER),
        # neither: the intervals hold both
        (0.0, (5.0, 0.9), 1.0, INCONCLUSIVE),
        (0.0, (5.0, 2.0), 1.5, INCONCLUSIVE),
        (-9.0, (2.0, 2.0), 1.5, INCONCLUSIVE),
        (0.0, (-2.0, 5.0), 3.0, INCONCLUSIVE),
    ],
)
def test_verdicts(dense, controls, spread, verdict):
    assert judge(accuracies(dense, *controls, spread=spread), XI).name == verdict


def test_every_failed_comparison_is_named():
    verdict = judge(accuracies(-5.0, 5.0, 0.0, -3.0), XI)
    assert verdict.name == NO_BETTER
    assert "control1, control2" in verdict.why and "control0" not in verdict.why and "more than 1 points behind the dense" in verdict.why
    assert [one.passed for one in verdict.comparisons] == ["no", "yes", "no", "no"]


def test_one_seed_proves_nothing():
    verdict = judge({name: values[:1] for name, values in accuracies(0.0, 50.0).items()}, XI)
    assert verdict.name == INCONCLUSIVE and verdict.seeds_needed is None and "--seeds 3" in verdict.why


@pytest.mark.parametrize(("lead", "spread"), [(2.0, 1.5), (3.0, 3.0), (0.7, 0.9)])
def test_the_number_of_seeds_that_is_said_would_settle_it(lead, spread):
    """With as many seeds of that mean and spread the comparison is settled, with one less it is not."""
    verdict = judge(accuracies(0.0, lead, spread=spread), XI)
    dense, control = verdict.comparisons
    needed = control.seeds_needed
    assert verdict.name == INCONCLUSIVE and needed > 3 and verdict.seeds_needed == max(needed, dense.seeds_needed)
    deviation = np.std([-spread, 0, spread], ddof=1)

    def settled(seeds: int) -> bool:
        values = np.linspace(-1, 1, seeds)
        values = lead + values / np.std(values, ddof=1) * deviation
        return judge({"ticket": [0.9] * seeds, "dense": [0.9] * seeds, "control": list(0.9 - values / 100)}, XI).name != INCONCLUSIVE

    assert settled(needed) and (not settled(needed - 1))


def test_what_no_seeds_settle_is_said():
    verdict = judge(accuracies(0.0, 0.5, spread=90.0), XI)
    assert verdict.seeds_needed is None and "more than 1000 seeds" in verdict.why


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0, 8.0]
    mean, half = mean_interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


# -- could pretraining have stopped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curves", "snapshot", "says"),
    [
        ([[50, 80, 89.5, 90.2, 90]], "epoch:2", "could have stopped at epoch:2 of epoch:4"),
        (
            [[50, 80, 89.5, 70, 90]],
            "epoch:4",
            "cannot be told: the ticket of epoch:2 is -0.50 points from that of epoch:4",
        ),  # one that is good by chance is not enough
        ([[50, 60, 70, 80, 90]], "epoch:4", "could not have stopped earlier: every earlier ticket is more than 1 point below"),
        ([[50, 60, 70, 80, 90], [52, 61, 69, 81, 90]], "epoch:4", "could not have stopped earlier: every earlier ticket"),
        ([[50, 60, 70, 88, 90], [50, 60, 70, 90, 90]], "epoch:4", "cannot be told: the ticket of epoch:3 is -1.00 +- 12.71 points"),
        ([[90, 90, 90, 90, 90]], "epoch:0", "do not tell when the ticket was there"),
        ([[50, 80, 89.5, 90, 90], [50, 80, 92, 90, 90]], "epoch:3", "2 runs"),  # in the mean near, but not surely
        ([[50, 80, 89.9, 90, 90], [50, 80, 90, 90, 90]], "epoch:2", "could have stopped at epoch:2"),
    ],
)
def test_the_earliest_stop(curves, snapshot, says):
    points = [
        Point(Path(f"run{number}"), "loft+4", f"epoch:{epoch}", float(epoch), 0.8, 0.8, value / 100, None, Path())
        for number, curve in enumerate(curves)
        for epoch, value in enumerate(curve)
    ]
    (stop,) = earliest_stops(points)
    assert stop.snapshot == snapshot and says in stop_sentence(stop, Saved(0.5, 0.5, 0.5))


def test_the_interval_of_a_difference_is_welchs():
    first, second = [60.0, 62.0, 61.0, 64.0], [58.0, 57.5, 59.0]
    difference, half = difference_interval(first, second)
    theirs = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx((theirs.low, theirs.high))
    assert difference_interval([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0)


def contender(label: str, *accuracies: float, budget: str = "retrained", kind: str = "filter", ratio: float = 0.8) -> SimpleNamespace:
    values = [accuracy / 100 for accuracy in accuracies]
    return SimpleNamespace(label=label, kind=kind, asked_ratio=ratio, budget=budget, accuracies=values, mean=float(np.mean(values)))


@pytest.mark.parametrize(
    ("rivals", "says"),
    [
        ([("random", 50, 51, 52), ("magnitude", 60, 61, 62), ("snip", 55, 55, 56)], "magnitude is ahead: +5.67 +- "),
        ([("random", 60, 61, 63), ("magnitude", 60, 62, 63)], "not told apart: magnitude and random (+0.33 +- "),
        ([("random", 50), ("magnitude", 60)], "magnitude is 10.00 points above random, which may be chance"),
        ([("random", 50, 51, 52), ("magnitude", 60)], "which may be chance"),
        ([("magnitude", 60, 60), ("random", 60, 60)], "not told apart"),
    ],
)  # fmt: skip
def test_which_finder_is_ahead(rivals, says):
    (sentence,) = leaders([contender(*rival) for rival in rivals] + [contender("dense (loft+4)", 90, 91, kind="dense")])
    assert sentence.startswith("80 % of the filters pruned, retrained: ") and says in sentence


def test_what_is_not_alike_is_not_ranked():
    assert not leaders(
        [
            contender("magnitude", 60, 61),
            contender("random", 50, 51, budget="retrained longer"),
            contender("imp", 70, 71, kind="weight"),
            contender("bn-scale", 40, 41, ratio=0.5),
        ]
    )
