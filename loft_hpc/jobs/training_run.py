"""What pretraining and retraining have in common: a place to compute, and a run on disk that a strategy trains into."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from loft_hpc.analysis.energy import Meter, energy_of_ranks, gpus_of
from loft_hpc.comm.world import World
from loft_hpc.data.catalogue import IMAGE_FOLDERS
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.files import refuse_links_outside
from loft_hpc.filterwise.emergence import Emergence, Stopping
from loft_hpc.jobs.agreement import refuse_disagreement, software
from loft_hpc.jobs.settings import CHANGEABLE, agreed, leaves, option_of, to_json
from loft_hpc.models.architecture import Architecture
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.lock import RunLock
from loft_hpc.runs.run import Run, claim_default_path, refuse_occupied
from loft_hpc.training.device import Placement, place
from loft_hpc.training.evaluation import Score
from loft_hpc.training.session import Outcome, Session
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots
from loft_hpc.training.strategy import Strategy
from loft_hpc.training.watching import Oversight


class TrainingSettings(Protocol):
    """What the settings of every training job hold, each with more of its own."""

    epochs: int
    batch_size: int
    seed: int
    snapshots: Snapshots
    checkpoints: Checkpointing
    data: DataSettings
    optimisation: Optimisation
    evaluation: Evaluation
    computation: Computation


@dataclass(frozen=True)
class Workplace:
    """Where this rank computes, and on what."""

    device: torch.device
    placements: list[Placement]
    """Of all ranks."""
    data: DataSet
    note: str | None = None
    """About how it reads, where that is in the way of computing."""


def prepare(settings: TrainingSettings, world: World) -> Workplace:
    """Choose devices and threads, and open the data set. Collective."""
    device, placement = place(settings.computation.device, settings.computation.precision, world, settings.computation.compile)
    data = open_data(settings.data, device, world)
    refuse_disagreement({f"the images of {data.info.name}, SHA-256": data.info.fingerprint}, world)
    note, wanted = None, settings.data.loader_workers
    if settings.data.dataset in IMAGE_FOLDERS and wanted is not None and wanted > world.cores:
        note = f"{wanted} loader processes for each rank, which has {world.cores} of the cores: --loader-workers {world.cores - 1} leaves one to compute"
    return Workplace(device, world.gather_objects(placement), data, note)


@dataclass(frozen=True)
class Destination:
    """The run to train into: a new one, or one to go on with."""

    path: Path | None
    """None until a folder of the default name is claimed."""
    earlier: Run | None
    extended: bool = False
    """Whether it goes on beyond the end that it was planned to have."""

    def claimed(self, name: tuple[str, str, str], world: World) -> "Destination":
        """With a path: without --run runs/MODEL-DATASET-STRATEGY+WORKERS-TIME, `name` being the first three. Collective.

        Called when all else is known to be in order: a start that is refused leaves no empty folder.
        """
        return self if self.path else replace(self, path=world.on_root(lambda: claim_default_path(*name, world.size)))

    @property
    def finished(self) -> Outcome | None:
        """What the run achieved, if there is nothing left to do."""
        if self.earlier is None or self.extended or self.earlier.description.get("status") != "done":
            return None
        try:
            results, images = self.earlier.description["results"], self.earlier.description["data"]["test_images"]
            if any(type(results[name]) not in (int, float) for name in ("test_loss", "wall_seconds")):
                raise TypeError("test_loss and wall_seconds are numbers")
            score = Score(round(self.earlier.accuracy * images), images, float(results["test_loss"]))
            steps = results.get("steps", self.earlier.required("total_steps", int))
            if images < 1:
                raise ValueError("no test images")
            return Outcome(score, float(results["wall_seconds"]), int(steps), bool(results.get("stopped_early", False)))
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise LoftError(f"{self.path / 'run.json'} says done, but not with what ({problem}): restore it") from None


def destination(settings: TrainingSettings, path: Path | None, resume: bool, world: World) -> Destination:
    """Where to train into. Collective.

    Raises LoftError where the ranks were started with different settings (but for where each finds the data) or software.
    """
    options = {option_of(name): value for name, value in agreed(settings).items()}
    refuse_disagreement(options | {"--run": path, "--resume": resume} | software(), world)
    if path is None or not (resume and world.on_root(lambda: (path / "run.json").exists())):
        return Destination(path, None)
    run = Run.open(path)
    return Destination(path, run, settings.epochs != run.configuration.get("epochs", settings.epochs))


def _newest_checkpoint(run: Run, workplace: Workplace, world: World, oversight: Oversight) -> Checkpoint | None:
    """The same one on every rank, chosen by rank 0. Raises LoftError if the data are not those that the run was started with."""
    if run.required("data", dict).get("fingerprint") != workplace.data.info.fingerprint:
        raise LoftError(
            f"the images of {workplace.data.info.name} are not those that {run.path} was started with: restore what was removed or added, "
            "or start another run"
        )
    step = world.on_root(lambda: run.checkpoints.newest_step(oversight.watcher.fell_back))
    return None if step is None else run.checkpoints.read(step)


def _changes(run: Run, configuration: Mapping[str, Any], supervision: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What this attempt does otherwise than the one before it, by setting."""
    before, now = leaves(run.configuration), leaves(dict(configuration))
    names = [name for name in now if name in CHANGEABLE or name in ("epochs", "restarts")]
    changed = {name: {"before": before.get(name), "now": now[name]} for name in names if before.get(name) != now[name]}
    earlier = run.description.get("supervision") or supervision
    return changed | {
        name: {"before": earlier.get(name), "now": value} for name, value in supervision.items() if earlier.get(name) != value
    }


def _observer(run: Run, stopping: Stopping, step: int) -> Emergence:
    """What has seen the snapshots up to a checkpoint's step. Where it decides nothing, a broken snapshot is no reason to fail."""
    try:
        return Emergence(stopping, [run.snapshots.read_scores(seen) for seen in run.snapshots.score_steps() if seen <= step])
    except LoftError:
        if stopping.stop_when_stable:
            raise
        return Emergence(stopping)


def train_into(
    where: Destination, kind: str, strategy: Strategy, settings: TrainingSettings, architecture: Architecture,
    hidden_widths: Mapping[str, int] | None, details: Mapping[str, Any], order: Order, workplace: Workplace, world: World,
    oversight: Oversight, stopping: Stopping | None = None,
) -> Outcome:  # fmt: skip
    """Train to the end and leave a complete run. Collective. A run that is gone on with starts from its newest checkpoint.

    With `stopping`, the filters' rankings are followed, and the training may end when they are stable.
    """
    lock = RunLock(where.path)
    if workplace.note:
        oversight.watcher.noted(workplace.note)
    if where.earlier and (ranks := where.earlier.required("world_size", int)) != world.size:
        if not strategy.any_world_size:
            raise LoftError(f"{where.path} was started with {ranks} ranks: resume it with as many, not {world.size}")
        oversight.watcher.other_world_size(ranks, world.size)

    def enter() -> None:
        if where.earlier is None:
            refuse_occupied(where.path)
        refuse_links_outside(where.path)
        lock.acquire()

    world.on_root(enter)
    try:
        return _train_locked(
            where, kind, strategy, settings, architecture, hidden_widths, details, order, workplace, world, oversight, stopping
        )
    finally:
        lock.release()


def _train_locked(
    where: Destination, kind: str, strategy: Strategy, settings: TrainingSettings, architecture: Architecture,
    hidden_widths: Mapping[str, int] | None, details: Mapping[str, Any], order: Order, workplace: Workplace, world: World,
    oversight: Oversight, stopping: Stopping | None,
) -> Outcome:  # fmt: skip
    checkpoint = _newest_checkpoint(where.earlier, workplace, world, oversight) if where.earlier else None
    description = {
        "architecture": architecture.to_json(),
        "seed": settings.seed,
        "world_size": world.size,
        "engine": world.engine,
        "placement": [asdict(placement) for placement in workplace.placements],
        "data": workplace.data.info.to_json(),
        "total_steps": strategy.total_steps,
        "steps_per_epoch": order.steps_per_epoch,
        **details,
    }
    configuration = to_json(settings)
    supervision = asdict(oversight.supervision)

    def begin_attempt() -> Run:
        if where.earlier is None:
            return Run.create(where.path, kind, configuration, {**description, "supervision": supervision})
        run = Run.open(where.path)
        run.resume(checkpoint.step if checkpoint else 0, configuration, description, _changes(run, configuration, supervision), supervision)
        return run

    run = world.on_root(begin_attempt)
    observer = None
    if stopping:
        observer = world.on_root(lambda: _observer(run, stopping, checkpoint.step if checkpoint else -1))
    with Meter(gpus_of(workplace.device)) as meter:
        begin = meter.read()
        session = Session(
            strategy, architecture, hidden_widths, workplace.data, settings.evaluation, settings.snapshots,
            settings.checkpoints, run, world, workplace.device, oversight, observer,
            account=lambda: {"energy": asdict(energy_of_ranks(meter.since(begin), world))},
        )  # fmt: skip
        return session.run(checkpoint)
