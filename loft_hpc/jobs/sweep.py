"""`loft sweep`: a ticket from every snapshot of a run, each retrained (the figure on the poster that shows when tickets emerge)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.registry import Reading, open_data
from loft_hpc.errors import LoftError
from loft_hpc.files import read_json
from loft_hpc.jobs.comparable import DENSE, DenseRuns, dense_ticket
from loft_hpc.jobs.prune import draw_tickets, ticket_name, ticket_names
from loft_hpc.jobs.retrain import RetrainSettings, retrain, snapshot_name
from loft_hpc.jobs.settings import CHANGEABLE, leaves, option_of, to_json
from loft_hpc.jobs.source import Surroundings
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.jsontext import to_json_text
from loft_hpc.models.scores import removed_text
from loft_hpc.runs.run import Run
from loft_hpc.runs.snapshots import point_of
from loft_hpc.tickets.pruning import Pruning
from loft_hpc.tickets.source import FINAL
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.watching import Oversight

EVERY = "every"


@dataclass(frozen=True)
class SweepSettings:
    """What is made of each run's snapshots, the same for all of them."""

    prunings: Sequence[Pruning]
    blocks: str
    at: Sequence[str]
    """Snapshots by name (`init`, `epoch:K`, `step:K`), or `every`."""
    name: str
    """Folder under RUN/sweeps; one for each recipe of retraining."""
    dense: bool = False
    """Whether the dense network of every snapshot is retrained as well."""


@dataclass(frozen=True)
class Point:
    """One snapshot's ticket, and what became of it."""

    run: Path
    label: str
    """Strategy and workers, for instance loft+4; with the folder's name where runs differ in more than their seed."""
    snapshot: str
    """As commands name it, for instance epoch:3."""
    epoch: float
    ratio: float
    """Pruning ratio that was asked for."""
    pruning_ratio: float
    """Share that is removed."""
    accuracy: float
    """Of the ticket after retraining, 0 to 1."""
    dense_accuracy: float | None
    """Of the dense network retrained from the same snapshot by the same recipe; None where it was not."""
    retrained: Path
    emptied_layers: tuple[str, ...] = ()
    """Layers of which a ticket of weights keeps none."""

    @property
    def removed(self) -> str:
        """Shares in words, that are removed and that were asked for."""
        return removed_text(self.pruning_ratio, self.ratio)


class SweepWatcher(Protocol):
    """Who is told of the progress."""

    def trained(self, number: int, trainings: int, what: str, accuracy: float, seconds_left: float | None) -> None: ...


def sweep(
    runs: Sequence[Path], settings: SweepSettings, recipe: Callable[[Run], RetrainSettings], world: World, watcher: SweepWatcher,
    quiet: Oversight,
) -> list[Point]:  # fmt: skip
    """Draw and retrain a ticket for every run, snapshot and pruning. Collective.

    `recipe` says how the tickets of a run are retrained. What is done is not done again: tickets and retrained runs that are there are
    used, and an interrupted retraining goes on. Raises LoftError where a sweep of this name was made with another recipe.
    """
    opened = {path.resolve(): Run.open_to_write(path) for path in runs}
    work = [(run, at, pruning) for run in opened.values() for at in _snapshots(run, settings.at) for pruning in settings.prunings]
    labels = _labels(list(opened.values()))
    recipes = {run.path: recipe(run) for run in opened.values()}
    for run in opened.values():
        data = open_data(recipes[run.path].data, torch.device("cpu"), world)
        meet(TrainedOn.of(run.path, run.architecture), data.info, continued=True)
        _agree_on_recipe(run, settings.name, recipes[run.path], world)
    for run in opened.values():
        ticket_names(settings.prunings, settings.blocks, FINAL, run.architecture)
    done, taken, trainings = [], [], _trainings(work, settings)
    for number, (run, at, pruning) in enumerate(trainings, start=1):
        began = time.perf_counter()
        own = recipes[run.path]
        if pruning is None:
            ticket, own = dense_ticket(run), replace(own, rewind=at if own.rewind == "none" else own.rewind)
            folder, what = run.path / "sweeps" / settings.name / f"{DENSE}-{at.replace(':', '-')}", "dense"
        else:
            around = Surroundings(world, quiet, Reading(own.data.data_dir, own.data.loader_workers), own.computation.device)
            ticket = _ticket(run, pruning, settings.blocks, at, around)
            folder, what = run.path / "sweeps" / settings.name / ticket.path.name, f"{100 * ticket.pruning_ratio:.4g} % pruned"
        there = world.on_root(partial(_is_done, folder))
        world.ledger = Ledger()  # each retraining counts its own
        _, outcome = retrain(ticket, own, folder, True, world, quiet)
        if not there:
            taken.append(time.perf_counter() - began)
        left = sum(taken) / len(taken) * (len(trainings) - number) if taken else None
        watcher.trained(number, len(trainings), f"{run.path.name}   {at}, {what}", outcome.score.accuracy, left)
        if pruning is not None:
            epoch = run.snapshots.step(snapshot_name(at, "--at")) / run.required("steps_per_epoch", int)
            removed, emptied = ticket.pruning_ratio, tuple(ticket.mask.emptied())
            done.append(Point(run.path, labels[run.path], at, epoch, pruning.ratio, removed, outcome.score.accuracy, None, folder, emptied))
    dense = DenseRuns()
    likes = [dense.like(Run.open(point.retrained)) for point in done]
    return [replace(point, dense_accuracy=like and like.accuracy) for point, like in zip(done, likes, strict=True)]


def _trainings(work: Sequence[tuple[Run, str, Pruning]], settings: SweepSettings) -> list[tuple[Run, str, Pruning | None]]:
    """What is retrained, in order; None in place of a pruning for the dense network."""
    found: list[tuple[Run, str, Pruning | None]] = []
    for place, (run, at, pruning) in enumerate(work):
        if settings.dense and (not place or work[place - 1][:2] != (run, at)):
            found.append((run, at, None))
        found.append((run, at, pruning))
    return found


def _is_done(folder: Path) -> bool:
    return (folder / "run.json").exists() and Run.open(folder).description.get("status") == "done"


def _labels(runs: Sequence[Run]) -> dict[Path, str]:
    """Strategy and workers; where runs of one such name differ in more than their seed, the folder's name, which tells them apart."""
    kinds: dict[str, set[str]] = {}
    for run in runs:
        kinds.setdefault(run.label, set()).add(to_json_text(run.configuration | {"seed": None}, sort_keys=True))
    return {run.path: run.label if len(kinds[run.label]) == 1 else f"{run.label} {run.path.name}" for run in runs}


def _snapshots(run: Run, at: Sequence[str]) -> list[str]:
    if run.description.get("kind") != "pretrain" or run.description.get("status") != "done":
        raise LoftError(f"{run.path} is no finished pretraining run: finish it with loft pretrain --run {run.path} --resume first")
    there = [point_of(name) for name in run.snapshots.names()]
    if list(at) == [EVERY]:
        return there
    chosen = list(dict.fromkeys(point_of(snapshot_name(point, "--at")) for point in at))
    for point in chosen:
        if point not in there:
            raise LoftError(f"{run.path} has no snapshot {point} with the full network: there are {', '.join(there)}")
    return chosen


def _agree_on_recipe(run: Run, name: str, recipe: RetrainSettings, world: World) -> None:
    """Note how the sweep's tickets are retrained; one name stands for one recipe and one number of ranks."""
    fields = {"world_size": world.size, "retraining": to_json(recipe)}

    def check() -> None:
        file = run.sweep_path(name)
        if not file.exists():
            run.write_sweep(name, fields)
            return
        differing = _first_difference(leaves(read_json(file)), leaves(fields))
        if differing:
            raise LoftError(f"{file.parent} was made with {differing}: repeat that, or give this sweep a --name of its own")

    world.on_root(check)


def _first_difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """As an option; where the data lie and what computes is no part of a recipe."""
    for name, value in earlier.items():
        if name in now and name not in CHANGEABLE and now[name] != value:
            if name == "world_size":
                return f"{value} ranks"
            option = "--retrain-seed" if name == "seed" else option_of(name)
            return f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return ""


def _ticket(run: Run, pruning: Pruning, blocks: str, at: str, around: Surroundings) -> Ticket:
    """The ticket of a snapshot, drawn unless it is there."""
    path = run.path / "tickets" / ticket_name(pruning, blocks, at, run.architecture)
    if not around.world.on_root(path.exists):
        (ticket,), _ = draw_tickets(run, [pruning], blocks, at, around)
        around.world.on_root(ticket.write)
    ticket = Ticket.read(path)
    amount, asked = pruning.finder.amount, ticket.provenance.get("ratio")
    same = type(asked) in (int, float) and 0 < asked < 1 and amount(asked, run.architecture) == amount(pruning.ratio, run.architecture)
    for name, value in pruning.to_json().items():
        if name == "ratio" and same:
            continue
        if ticket.provenance.get(name, value) != value:  # tickets of earlier versions say less
            raise LoftError(f"{path} was drawn with {name} {ticket.provenance.get(name)}, not {value}: move it away, or repeat that")
    return ticket
