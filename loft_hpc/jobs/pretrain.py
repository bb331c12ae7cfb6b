"""`loft pretrain`: settings in, a run on disk out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loft_hpc import seeds
from loft_hpc.analysis.traffic import division
from loft_hpc.comm.world import World
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.filterwise.loft import Loft, LoftSettings
from loft_hpc.jobs.settings import from_json
from loft_hpc.jobs.training_run import destination, prepare, train_into
from loft_hpc.jobs.weights import starting_parameters
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.resnet import build
from loft_hpc.pipeline.gpipe import GPipe, PipelineSettings
from loft_hpc.runs.run import Run
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.session import Outcome
from loft_hpc.training.settings import (
    MAX_BATCH,
    MAX_EPOCHS,
    MAX_ROUNDS,
    MAX_SEED,
    MAX_STEPS,
    Checkpointing,
    Computation,
    Evaluation,
    Optimisation,
    Snapshots,
    refuse_outside,
)
from loft_hpc.training.strategy import Strategy
from loft_hpc.training.watching import Oversight

STRATEGIES = ("loft", "data-parallel", "gpipe")


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides a pretraining run, but for the number of ranks."""

    model: str = "resnet34"
    widen: float | None = None
    """Hidden filters as a multiple of the stage's width; None for the model's own (2 for wideresnet, else 1)."""
    weights: str | None = None
    """Safetensors file of the parameters to start from; None to draw them from the seed."""
    new_classifier: bool = False
    """Whether the classifier is drawn from the seed all the same."""
    strategy: str = "loft"
    epochs: int = 10
    """Passes over the training images: of each worker under `loft` with replicated data, else of all together."""
    rounds: int | None = None
    """Rounds of `local_iterations` steps, in place of epochs."""
    batch_size: int = 64
    """Images per step: of each worker under `loft`, of all ranks together under `data-parallel` and `gpipe`."""
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    loft: LoftSettings = field(default_factory=LoftSettings)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    optimisation: Optimisation = field(default_factory=Optimisation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    computation: Computation = field(default_factory=Computation)
    snapshots: Snapshots = field(default_factory=Snapshots)
    checkpoints: Checkpointing = field(default_factory=Checkpointing)
    stopping: Stopping = field(default_factory=Stopping)

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise LoftError(f"unknown strategy '{self.strategy}': choose one of {', '.join(STRATEGIES)}", usage=True)
        if self.model not in MODEL_NAMES:
            raise LoftError(f"unknown model '{self.model}': choose one of {', '.join(MODEL_NAMES)}", usage=True)
        if self.epochs < 1 or (self.rounds is not None and self.rounds < 1) or self.batch_size < 1:
            raise LoftError("--epochs, --rounds and --batch-size must be at least 1", usage=True)
        if self.epochs > MAX_EPOCHS:
            raise LoftError(f"--epochs must be at most {MAX_EPOCHS:,}", usage=True)
        refuse_outside(self, seed=(0, MAX_SEED), rounds=(1, MAX_ROUNDS), batch_size=(1, MAX_BATCH))
        if self.widen is not None:
            try:
                architecture(self.model, 1, widen=self.widen)
            except LoftError as problem:
                raise LoftError(str(problem), usage=True) from None
        if (self.rounds or 0) * self.loft.local_iterations > MAX_STEPS:
            raise LoftError(f"--rounds times --local-iterations must be at most {MAX_STEPS:,} steps", usage=True)
        if self.stopping.stop_when_stable and not self.snapshots.every.count:
            raise LoftError("--stop-when-stable compares snapshots: give --snapshot-every an interval, for instance 1ep", usage=True)
        if self.rounds is not None and self.strategy != "loft":
            raise LoftError(f"--rounds counts LoFT's rounds: use --epochs with --strategy {self.strategy}", usage=True)
        if self.new_classifier and self.weights is None:
            raise LoftError("--new-classifier replaces the classifier of --weights: give both, or omit it", usage=True)
        if self.weights is not None and "\0" in self.weights:
            raise LoftError("--weights names no file: it holds a null byte", usage=True)
        if self.strategy == "gpipe":
            self.pipeline.check_batch(self.batch_size)
            if self.computation.compile:
                raise LoftError("--compile is for loft and data-parallel: a pipeline's stages are not compiled", usage=True)


def pretrain(settings: PretrainSettings, path: Path | None, resume: bool, world: World, oversight: Oversight) -> tuple[Path, Outcome]:
    """Train, and leave a complete run at `path` (by default under runs/). Collective: every rank calls it.

    With `resume`, a run at `path` is continued from its newest checkpoint; where there is none yet, one is started, and one that is
    done is left as it is.
    """
    where = destination(settings, path, resume, world)
    if where.finished:
        return where.path, where.finished
    workplace = prepare(settings, world)
    info, device, computation = workplace.data.info, workplace.device, settings.computation
    network = architecture(settings.model, info.num_classes, info.channels, info.stem, settings.widen)
    order = order_of(settings, info.train_images, world.rank, world.size)
    oversight.watcher.prepared(order.steps_per_epoch * step_images(settings, world.size))
    total_steps = settings.rounds * settings.loft.local_iterations if settings.rounds else settings.epochs * order.steps_per_epoch
    # Parameters alone: nothing keeps statistics, and every evaluation makes its own.
    initial = {name: tensor.detach() for name, tensor in build(network, seed=seeds.derive(settings.seed, "init")).named_parameters()}
    started_from: dict[str, Any] = {}
    if settings.weights is not None:
        initial, started_from = starting_parameters(Path(settings.weights), initial, settings.new_classifier, where.earlier, world)
    parameters = sum(tensor.numel() for tensor in initial.values())
    common = (settings.optimisation, workplace.data, order, total_steps)
    snapshot_steps = settings.snapshots.every.steps(order.steps_per_epoch)
    strategy: Strategy
    if settings.strategy == "loft":
        strategy = Loft(network, initial, settings.loft, *common, settings.seed, computation, device, world, snapshot_steps)
        divided = division(network, settings.loft.partition, settings.loft.partition_unit)
        details = {"parameters": parameters, "partitioned_parameters": divided.partitioned, "shared_parameters": divided.shared}
    elif settings.strategy == "gpipe":
        strategy = GPipe(network, initial, settings.pipeline, *common, computation, device, world)
        details = {"parameters": parameters, "cut_after_blocks": list(strategy.cuts)}
    else:
        strategy = DataParallel(network, None, initial, *common, computation, device, world)
        details = {"parameters": parameters}
    where = where.claimed((settings.model, settings.data.dataset, settings.strategy), world)
    outcome = train_into(
        where, "pretrain", strategy, settings, network, None, details | started_from, order, workplace, world, oversight, settings.stopping
    )
    return where.path, outcome


def order_of(settings: PretrainSettings, train_images: int, rank: int, size: int) -> Order:
    """Which images rank `rank` of `size` sees; all ranks of a pipeline are one worker. Raises LoftError for batches that cannot be."""
    rank, size = (0, 1) if settings.strategy == "gpipe" else (rank, size)
    sharing = "split" if settings.strategy == "data-parallel" else "sharded" if settings.loft.shard_data else "replicated"
    return Order(sharing, train_images, settings.batch_size, settings.seed, rank, size)


def step_images(settings: Any, workers: int) -> int:
    """Images of a step of all workers together; `settings` of a pretraining or retraining."""
    return settings.batch_size * (workers if settings.strategy == "loft" else 1)


def settings_of(run: Run) -> PretrainSettings:
    """The settings that a pretraining run was made with."""
    if run.description.get("kind") != "pretrain":
        raise LoftError(f"{run.path} is no pretraining run: give the folder that `loft pretrain` printed")
    return from_json(PretrainSettings, run.configuration)
