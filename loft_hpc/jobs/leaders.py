"""Which of the tickets that `loft compare` sets side by side is ahead, and whether that is more than chance."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from loft_hpc.analysis.statistics import difference_interval
from loft_hpc.jobs.compare import Contender
from loft_hpc.runs.run import Run

UNITS = {"filter": "filters", "layer": "layers", "weight": "weights"}


def leaders(contenders: Sequence[Contender]) -> list[str]:
    """A sentence for each budget, unit and pruning ratio that several methods have in common: what is alike but for the method."""
    return [_sentence(rivals) for rivals in _alike(contenders)]


def next_step(contenders: Sequence[Contender]) -> str:
    """The command that goes on from here: a check of the ticket that is ahead, at the lowest density where methods are compared."""
    rivals = _alike(contenders)
    tickets = [one for one in contenders if one.kind != "dense"]
    if not tickets:
        return "next: loft prune RUN     # these are dense networks alone"
    leader = (rivals[-1] if rivals else sorted(tickets, key=lambda one: -one.mean))[0]
    ticket = Run.open(leader.paths[0]).required("ticket", dict).get("path")
    return f"next: loft check {_from_here(Path(str(ticket)))}     # {leader.label}: is it a winning ticket?"


def _alike(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Tickets that differ in their method alone, the best first; by density, the densest first."""
    groups: dict[tuple, list[Contender]] = {}
    for one in contenders:
        if one.kind != "dense":
            groups.setdefault((one.budget, one.kind, one.asked_ratio), []).append(one)
    rivals = [sorted(group, key=lambda one: -one.mean) for group in groups.values() if len(group) > 1]
    return sorted(rivals, key=lambda group: group[0].asked_ratio)


def _sentence(rivals: Sequence[Contender]) -> str:
    first, second = rivals[:2]
    difference, half = difference_interval(*([100 * value for value in one.accuracies] for one in (first, second)))
    where = f"{100 * first.asked_ratio:.4g} % of the {UNITS.get(first.kind, 'units')} pruned, {first.budget}"
    if half != half:
        told = f"{first.label} is {difference:.2f} points above {second.label}, which may be chance: retrain both with more seeds"
    elif difference - half > 0:
        told = f"{first.label} is ahead: {difference:+.2f} +- {half:.2f} points over {second.label}, the next"
    else:
        told = f"not told apart: {first.label} and {second.label} ({difference:+.2f} +- {half:.2f} points)"
    return f"{where}: {told}"


def _from_here(path: Path) -> str:
    """As one types it in this folder."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path))
