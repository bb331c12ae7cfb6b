"""`loft pretrain`: settings in, a run on disk out."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from loft_hpc import seeds
from loft_hpc.comm.world import World
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.loft import Loft, LoftSettings
from loft_hpc.jobs.settings import from_json, to_json
from loft_hpc.models.architecture import architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run, default_path
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.device import place
from loft_hpc.training.session import Outcome, Session, Watcher
from loft_hpc.training.settings import Computation, Evaluation, Optimisation
from loft_hpc.training.strategy import Strategy

STRATEGIES = ("loft", "data-parallel")


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides a pretraining run, but for the number of ranks."""

    model: str = "resnet34"
    widen: float | None = None
    """Hidden filters as a multiple of the stage's width; None for the model's own (2 for wideresnet, else 1)."""
    strategy: str = "loft"
    epochs: int = 10
    """Walks through the training images, per worker."""
    rounds: int | None = None
    """Rounds of `local_iterations` steps, in place of epochs."""
    batch_size: int = 32
    """Images per step: of each worker under `loft`, of all ranks together under `data-parallel`."""
    seed: int = 0
    snapshot_every: int = 1
    """Epochs between full snapshots; 0 keeps the first and the last alone."""
    data: DataSettings = field(default_factory=DataSettings)
    loft: LoftSettings = field(default_factory=LoftSettings)
    optimisation: Optimisation = field(default_factory=Optimisation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    computation: Computation = field(default_factory=Computation)

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise LoftError(f"unknown strategy '{self.strategy}': choose one of {', '.join(STRATEGIES)}", usage=True)
        if self.epochs < 1 or (self.rounds is not None and self.rounds < 1) or self.batch_size < 1:
            raise LoftError("--epochs, --rounds and --batch-size must be at least 1", usage=True)
        if self.seed < 0 or self.snapshot_every < 0:
            raise LoftError("--seed and --snapshot-every must be 0 or more", usage=True)
        if self.rounds is not None and self.strategy != "loft":
            raise LoftError(f"--rounds counts LoFT's rounds: use --epochs with --strategy {self.strategy}", usage=True)


def pretrain(settings: PretrainSettings, path: Path | None, resume: bool, world: World, watcher: Watcher) -> tuple[Path, Outcome]:
    """Train, and leave a complete run at `path` (by default under runs/). Collective: every rank calls it.

    With `resume`, a run at `path` is continued from its newest checkpoint; where there is none yet, one is started.
    """
    if path is None:
        path = world.on_root(lambda: default_path(settings.model, settings.data.dataset, settings.strategy, world.size))
    going_on = resume and world.on_root(lambda: (path / "run.json").exists())
    device, placement = place(settings.computation.device, settings.computation.precision, world)
    data = open_data(settings.data, device, world)
    network = architecture(settings.model, data.info.num_classes, data.info.channels, data.info.stem, settings.widen)
    sharing = "split" if settings.strategy == "data-parallel" else "sharded" if settings.loft.shard_data else "replicated"
    order = Order(sharing, data.info.train_images, settings.batch_size, settings.seed, world.rank, world.size)
    total_steps = settings.rounds * settings.loft.local_iterations if settings.rounds else settings.epochs * order.steps_per_epoch

    initial = build(network, seed=seeds.derive(settings.seed, "init"))
    # Parameters alone: LoFT keeps no statistics, and every evaluation makes its own.
    state = {name: parameter.detach() for name, parameter in initial.named_parameters()}
    common = (settings.optimisation, data, order, total_steps)
    strategy: Strategy
    if settings.strategy == "loft":
        strategy = Loft(
            network, state, settings.loft, *common, seed=settings.seed, precision=settings.computation.precision, device=device, world=world
        )
    else:
        strategy = DataParallel(network, None, state, *common, precision=settings.computation.precision, device=device, world=world)

    placements = world.gather_objects(placement)
    details = {
        "architecture": network.to_json(),
        "seed": settings.seed,
        "world_size": world.size,
        "placement": [asdict(each) for each in placements],
        "data": data.info.to_json(),
        "total_steps": total_steps,
        "steps_per_epoch": order.steps_per_epoch,
        **_parameter_counts(strategy, settings, state, network),
    }
    checkpoint = Run.open(path).read_checkpoint() if going_on else None
    run = world.on_root(lambda: Run.create_or_resume(path, going_on, "pretrain", to_json(settings), details))
    session = Session(
        strategy, network, None, data, settings.optimisation, settings.evaluation, settings.snapshot_every, run, world, device, watcher
    )
    return path, session.run(checkpoint)


def settings_of(run: Run) -> PretrainSettings:
    """The settings that a pretraining run was made with."""
    if run.description.get("kind") != "pretrain":
        raise LoftError(f"{run.path} is no pretraining run: give the folder that `loft pretrain` printed")
    return from_json(PretrainSettings, run.configuration)


def _parameter_counts(strategy: Strategy, settings: PretrainSettings, state: dict, network) -> dict:
    """Parameters of the full network, and how LoFT divides them."""
    total = sum(tensor.numel() for tensor in state.values())
    if settings.strategy != "loft":
        return {"parameters": total}
    dealt = {name for group in partitioned_groups(filter_groups(network), settings.loft.partition) for name, _ in group.members}
    partitioned = sum(tensor.numel() for name, tensor in state.items() if name in dealt)
    return {"parameters": total, "partitioned_parameters": partitioned, "shared_parameters": total - partitioned}
