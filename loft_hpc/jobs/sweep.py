"""`loft sweep`: a ticket from every snapshot of a run, each retrained (the figure on the poster that shows when tickets emerge)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.jobs.prune import draw_tickets, ticket_name
from loft_hpc.jobs.retrain import RetrainSettings, retrain, snapshot_name
from loft_hpc.jobs.settings import to_json
from loft_hpc.runs.files import read_json
from loft_hpc.runs.run import Run, point_of
from loft_hpc.tickets.finders import Pruning
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.session import Watcher

EVERY = "every"


@dataclass(frozen=True)
class SweepSettings:
    """What is made of each run's snapshots, the same for all of them."""

    prunings: Sequence[Pruning]
    at: Sequence[str]
    """Snapshots by name (`init`, `epoch:K`, `step:K`), or `every`."""
    name: str
    """Folder under RUN/sweeps; one for each recipe of retraining."""


@dataclass(frozen=True)
class Point:
    """One snapshot's ticket, and what became of it."""

    run: Path
    label: str
    """Strategy and workers, for instance loft+4."""
    snapshot: str
    """As commands name it, for instance epoch:3."""
    epoch: float
    ratio: float
    """Pruning ratio."""
    accuracy: float
    """Of the ticket after retraining, 0 to 1."""
    dense_accuracy: float
    """Of the run's final network, not pruned."""
    retrained: Path


class SweepWatcher(Protocol):
    """Who is told of the progress."""

    def point_done(self, number: int, points: int, point: Point, seconds_left: float | None) -> None: ...


def sweep(
    runs: Sequence[Path], settings: SweepSettings, recipe: Callable[[Run], RetrainSettings], world: World, watcher: SweepWatcher,
    quiet: Watcher,
) -> list[Point]:  # fmt: skip
    """Draw and retrain a ticket for every run, snapshot and pruning. Collective.

    `recipe` says how the tickets of a run are retrained. What is done is not done again: tickets and retrained runs that are there are
    used, and an interrupted retraining goes on. Raises LoftError where a sweep of this name was made with another recipe.
    """
    work = [(Run.open(path), at, pruning) for path in runs for at in _snapshots(path, settings.at) for pruning in settings.prunings]
    recipes = {run.path: recipe(run) for run, _, _ in work}
    for path in runs:
        _agree_on_recipe(path, settings.name, recipes[path], world)
    points, taken = [], []
    for number, (run, at, pruning) in enumerate(work, start=1):
        began = time.perf_counter()
        ticket = _ticket(run, pruning, at, world)
        folder = run.path / "sweeps" / settings.name / ticket.path.name
        known = world.on_root(lambda folder=folder: (folder / "run.json").exists())
        done = known and Run.open(folder).description.get("status") == "done"
        world.ledger = Ledger()
        _, outcome = retrain(ticket, recipes[run.path], folder, True, world, quiet)
        if not done:
            taken.append(time.perf_counter() - began)
        description = run.description
        point = Point(
            run.path, f"{description['configuration']['strategy']}+{description['world_size']}", at,
            run.snapshot_step(snapshot_name(at, "--at")) / description["steps_per_epoch"], pruning.ratio, outcome.score.accuracy,
            description["results"]["accuracy"], folder,
        )  # fmt: skip
        points.append(point)
        watcher.point_done(number, len(work), point, sum(taken) / len(taken) * (len(work) - number) if taken else None)
    return points


def _snapshots(path: Path, at: Sequence[str]) -> list[str]:
    run = Run.open(path)
    if run.description.get("kind") != "pretrain" or run.description.get("status") != "done":
        raise LoftError(f"{path} is no finished pretraining run: finish it with loft pretrain --run {path} --resume first")
    there = [point_of(name) for name in run.snapshot_names()]
    if list(at) == [EVERY]:
        return there
    chosen = [point_of(snapshot_name(point, "--at")) for point in at]
    for point in chosen:
        if point not in there:
            raise LoftError(f"{path} has no snapshot {point} with the full network: there are {', '.join(there)}")
    return chosen


def _agree_on_recipe(path: Path, name: str, recipe: RetrainSettings, world: World) -> None:
    """Note how the sweep's tickets are retrained; one name stands for one recipe and one number of ranks."""
    run = Run.open(path)
    fields = {"world_size": world.size, "retraining": to_json(recipe)}

    def check() -> None:
        file = run.sweep_path(name)
        if not file.exists():
            run.write_sweep(name, fields)
            return
        earlier = read_json(file)
        differing = _first_difference(_leaves(earlier), _leaves(fields))
        if differing:
            raise LoftError(f"{file.parent} was made with {differing}: repeat that, or give this sweep a --name of its own")

    world.on_root(check)


def _leaves(fields: dict) -> dict[str, object]:
    found = {}
    for name, value in fields.items():
        found |= _leaves(value) if isinstance(value, dict) else {name: list(value) if isinstance(value, tuple) else value}
    return found


def _first_difference(earlier: dict[str, object], now: dict[str, object]) -> str:
    for name, value in earlier.items():
        if name in now and now[name] != value:
            return f"{value} ranks" if name == "world_size" else f"--{name.replace('_', '-')} {value}"
    return ""


def _ticket(run: Run, pruning: Pruning, at: str, world: World) -> Ticket:
    """The ticket of a snapshot, drawn unless it is there."""
    path = run.path / "tickets" / ticket_name(pruning, "all", at)
    if not world.on_root(path.exists):
        (ticket,) = draw_tickets(run, [pruning], "all", at)
        world.on_root(ticket.write)
    ticket = Ticket.read(path)
    for name, value in asdict(pruning).items():
        if ticket.provenance.get(name) != value:
            raise LoftError(f"{path} was drawn with {name} {ticket.provenance.get(name)}, not {value}: move it away, or repeat that")
    return ticket
