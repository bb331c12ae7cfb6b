"""Whether a pretraining could have stopped earlier: by its tickets, retrained from every snapshot, or by the rule that watches rankings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loft_hpc.analysis.statistics import NEAR, mean_interval
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.emergence import LEFT, Emergence, Stopping
from loft_hpc.jobs.cost import cost_of
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.sweep import Point
from loft_hpc.jsontext import finite_or_none
from loft_hpc.runs.run import Run


@dataclass(frozen=True)
class Saved:
    """Shares of a pretraining that an earlier end saves."""

    epochs: float
    payload_bytes: float
    wall_seconds: float


def saved(runs: Sequence[Run], steps: Sequence[int]) -> Saved:
    """Mean over runs that end after `steps` in place of their last step."""
    pairs = [(cost_of(run, step), cost_of(run)) for run, step in zip(runs, steps, strict=True)]

    def share(name: str) -> float:
        wholes = [(getattr(part, name), getattr(whole, name)) for part, whole in pairs]
        return sum(1 - part / whole if whole else 0.0 for part, whole in wholes) / len(wholes)

    return Saved(share("epochs"), share("payload_bytes"), share("wall_seconds"))


def stopping_step(run: Run, stopping: Stopping) -> int | None:
    """The step after which a run would have stopped under other settings than its own, from its recorded scores; None for never."""
    emergence = Emergence(replace(stopping, stop_when_stable=True))
    return next((step for step in run.snapshots.score_steps() if emergence.see(run.snapshots.read_scores(step)).stop), None)


@dataclass(frozen=True)
class Stability:
    """What the rule that watches rankings says of a finished pretraining."""

    stopped: bool
    """Whether it was ended by the rule."""
    epoch: float | None
    """Where the rule ends it, in epochs done; None where it never does."""
    epochs: float
    """Planned."""
    from_initial: float
    """Distance of the last ranking to the initial one, over the filters in view: 0 the same, 1 as if random."""
    tolerance: float
    saved: Saved | None
    """By ending there; None where the rule never does, or only at the end."""


def stability(run: Run) -> Stability | None:
    """From a pretraining's recorded scores, by its own rule; None where there are too few snapshots to tell, or a broken one."""
    stopping, steps = settings_of(run).stopping, run.snapshots.score_steps()
    tolerance, patience = stopping.limits
    if len(steps) < patience + 2:
        return None
    try:
        first, last = (run.snapshots.read_scores(step) for step in (steps[0], steps[-1]))
        step = stopping_step(run, stopping)
    except LoftError:
        return None
    seen = Emergence(stopping, [first]).see(last).fields
    total, per_epoch = run.required("total_steps", int), run.required("steps_per_epoch", int)
    early = step is not None and step < total
    return Stability(
        bool((run.description.get("results") or {}).get("stopped_early")), None if step is None else step / per_epoch,
        total / per_epoch, seen["top_distance_to_initial"], tolerance, saved_of_plan(run, step) if early else None,
    )  # fmt: skip


def saved_of_plan(run: Run, step: int) -> Saved:
    """What ending after `step` saves of the training that was planned: of one that did end there, in proportion to its steps."""
    if (run.description.get("results") or {}).get("stopped_early"):
        share = 1 - step / run.required("total_steps", int)
        return Saved(share, share, share)
    return saved([run], [step])


def stability_sentence(found: Stability) -> str:
    """Where the rule ends the pretraining, and what that saves."""
    if found.epoch is None and found.from_initial <= LEFT:
        return (
            f"rankings: after {found.epochs:.3g} epochs still within {LEFT:g} of the initial ones ({found.from_initial:.3f}): "
            "they say nothing about a ticket yet; train longer or raise --lr"
        )
    if found.epoch is None:
        return f"rankings: never stable in {found.epochs:.3g} epochs (tolerance {found.tolerance:g})"
    if found.saved is None:
        return f"rankings: stable only at the end, after {found.epoch:.3g} epochs: nothing to save"
    share = found.saved
    if found.stopped:
        return f"rankings: stable, stopped after {found.epoch:.3g} of {found.epochs:.3g} epochs: {_percent(share.epochs)} of the training saved"
    return (
        f"rankings: stable after {found.epoch:.3g} of {found.epochs:.3g} epochs: --stop-when-stable would have saved "
        f"{_percent(share.epochs)} of the epochs, {_percent(share.payload_bytes)} of the bytes, {_percent(share.wall_seconds)} of the seconds"
    )


def stability_fields(found: Stability | None) -> dict[str, Any] | None:
    """For JSON: units in the names."""
    if found is None:
        return None
    return {
        "stopped": found.stopped,
        "stable_epoch": found.epoch,
        "planned_epochs": found.epochs,
        "distance_to_initial": found.from_initial,
        "tolerance": found.tolerance,
        **({} if found.saved is None else {f"saved_{name}_share": value for name, value in asdict(found.saved).items()}),
    }


@dataclass(frozen=True)
class Stop:
    """The earliest snapshot from which on all tickets were as good as the last one's, for one strategy and pruning ratio."""

    label: str
    ratio: float
    """What was asked for."""
    removed: str
    """Shares in words, that are removed and that were asked for."""
    runs: tuple[Path, ...]
    epochs: tuple[float, ...]
    """Done at that snapshot, by run."""
    snapshot: str
    last: str
    difference: float
    """Of its ticket to the last one's, percentage points, mean over the runs."""
    half_width: float
    """Of its 95 % interval; not a number for one run."""
    at_start: bool
    """Whether it is the first snapshot that was looked at: then these data do not show what pretraining is good for."""
    earlier: tuple[tuple[str, float, float], ...]
    """Of every snapshot before the last: its name, the difference of its ticket to the last one's, and half the width of the interval."""

    def saved(self) -> Saved:
        """By ending there, from what the runs say about themselves."""
        runs = [Run.open(path) for path in self.runs]
        steps = [round(epoch * run.required("steps_per_epoch", int)) for run, epoch in zip(runs, self.epochs, strict=True)]
        return saved(runs, steps)


def earliest_stops(points: Sequence[Point]) -> list[Stop]:
    """One for each label and ratio with two snapshots or more. As good: at most NEAR points worse, with several runs at 95 % confidence."""
    found = []
    for label, ratio in dict.fromkeys((point.label, point.ratio) for point in points):
        mine = [point for point in points if (point.label, point.ratio) == (label, ratio)]
        by_run = [[point for point in mine if point.run == run] for run in dict.fromkeys(point.run for point in mine)]
        common = [name for name in (point.snapshot for point in by_run[0]) if all(name in {p.snapshot for p in own} for own in by_run)]
        if len(common) < 2:
            continue
        accuracy = {(point.run, point.snapshot): 100 * point.accuracy for point in mine}
        differences = {
            name: mean_interval([accuracy[own[0].run, name] - accuracy[own[0].run, common[-1]] for own in by_run]) for name in common
        }
        first = len(common) - 1
        while first and _near(*differences[common[first - 1]]):
            first -= 1
        name, paths = common[first], tuple(own[0].run for own in by_run)
        epochs = tuple(next(point.epoch for point in own if point.snapshot == name) for own in by_run)
        earlier = tuple((before, *differences[before]) for before in common[:-1])
        found.append(Stop(label, ratio, mine[0].removed, paths, epochs, name, common[-1], *differences[name], not first, earlier))
    return found


def _near(difference: float, half_width: float) -> bool:
    return difference - (half_width if half_width == half_width else 0.0) >= -NEAR


def stop_sentence(stop: Stop, saving: Saved) -> str:
    """The answer to the question whether this pretraining could have stopped earlier, and what that saves."""
    runs = len(stop.runs)
    who = f"{stop.label}, {stop.removed} pruned ({runs} run{'s' * (runs > 1)})"
    if stop.snapshot == stop.last:
        return f"{who}: {_not_earlier(stop)}"
    interval = f" +- {stop.half_width:.2f}" if stop.half_width == stop.half_width else ", one run, no interval"
    said = (
        f"{who}: pretraining could have stopped at {stop.snapshot} of {stop.last}: from there on tickets are within {NEAR:g} point of the "
        f"last one ({stop.difference:+.2f}{interval}); saves {_percent(saving.epochs)} of the epochs, "
        f"{_percent(saving.payload_bytes)} of the bytes"
    )
    if stop.at_start:
        said += ". That is the first snapshot looked at: these data do not tell when the ticket was there"
    return said


def _not_earlier(stop: Stop) -> str:
    """That every earlier ticket is worse, or that these data do not tell."""
    if all(difference + (half if half == half else 0) < -NEAR for _, difference, half in stop.earlier):
        return f"pretraining could not have stopped earlier: every earlier ticket is more than {NEAR:g} point below that of {stop.last}"
    name, difference, half = max(stop.earlier, key=lambda one: one[1])
    interval = f" +- {half:.2f}" if half == half else ""
    why = "one run does not say what is chance" if len(stop.runs) == 1 else f"{len(stop.runs)} runs leave too wide intervals"
    return (
        f"whether pretraining could have stopped earlier cannot be told: the ticket of {name} is {difference:+.2f}{interval} points from that of "
        f"{stop.last}, but not all after it are within {NEAR:g} point of that for sure; {why}: sweep runs of more seeds together"
    )


def stop_fields(stop: Stop, saving: Saved) -> dict[str, Any]:
    """For JSON: units in the names."""
    return {
        "strategy": stop.label,
        "ratio": stop.ratio,
        "runs": len(stop.runs),
        "snapshot": stop.snapshot,
        "last_snapshot": stop.last,
        "difference_points": stop.difference,
        "difference_half_width_points": finite_or_none(stop.half_width),
        "at_start": stop.at_start,
        "saved_epochs_share": saving.epochs,
        "saved_payload_bytes_share": saving.payload_bytes,
        "saved_wall_seconds_share": saving.wall_seconds,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
