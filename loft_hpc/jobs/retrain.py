"""`loft retrain`: a ticket in, a run with its retrained network out."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.settings import from_json, to_json
from loft_hpc.runs.run import Run, default_path
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.device import place
from loft_hpc.training.session import Outcome, Session, Watcher
from loft_hpc.training.settings import Computation, Evaluation, Optimisation

LEARNING_RATE = 0.03
"""Default at the start of retraining: the weights are trained already (docs/results.md compares 0.1, 0.05 and 0.03 on digits)."""


@dataclass(frozen=True)
class RetrainSettings:
    """Everything that decides a retraining run, but for the ticket and the number of ranks."""

    rewind: str = "none"
    """Weights to start from: `none` (as pruned), `init` (before pretraining) or `epoch:K` (a snapshot of pretraining)."""
    epochs: int = 10
    batch_size: int = 128
    """Images per step of all ranks together: every rank normalises by its own part, which should not become tiny."""
    seed: int = 0
    snapshot_every: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(lr=LEARNING_RATE))
    evaluation: Evaluation = field(default_factory=Evaluation)
    computation: Computation = field(default_factory=Computation)

    def __post_init__(self):
        rewind_epoch(self.rewind)
        if self.epochs < 1 or self.batch_size < 1:
            raise LoftError("--epochs and --batch-size must be at least 1", usage=True)
        if self.seed < 0 or self.snapshot_every < 0:
            raise LoftError("--seed and --snapshot-every must be 0 or more", usage=True)


def rewind_epoch(rewind: str) -> int | None:
    """The pretraining epoch that a --rewind names; None for no rewinding. `init` is epoch 0."""
    if rewind == "none":
        return None
    if rewind == "init":
        return 0
    match = re.fullmatch(r"epoch:(\d{1,6})", rewind)
    if not match:
        raise LoftError(f"--rewind {rewind} is not known: give none, init or epoch:K with a whole number K", usage=True)
    return int(match[1])


def starting_weights(ticket: Ticket, rewind: str) -> dict[str, Tensor]:
    """The ticket's parameters at the point that `rewind` names. Raises LoftError where the run has no such snapshot."""
    epoch = rewind_epoch(rewind)
    if epoch is None:
        return {name: tensor for name, tensor in ticket.state.items() if _is_parameter(name)}
    if not (ticket.run_path / "run.json").is_file():
        raise LoftError(
            f"{ticket.path} does not lie in its run any more (RUN/tickets/NAME), so there is nothing to rewind to: move it back"
        )
    return ticket.slice(Run.open(ticket.run_path).read_snapshot(epoch))


def ticket_data(ticket: Ticket) -> DataSettings:
    """The data set that the ticket was found on."""
    return from_json(DataSettings, ticket.provenance.get("data", {}))


def retrain(
    ticket: Ticket, settings: RetrainSettings, path: Path | None, resume: bool, world: World, watcher: Watcher
) -> tuple[Path, Outcome]:
    """Train a ticket data-parallel over all ranks, and leave a complete run at `path`. Collective."""
    if path is None:
        path = world.on_root(lambda: default_path(ticket.architecture.model, settings.data.dataset, "retrain", world.size))
    going_on = resume and world.on_root(lambda: (path / "run.json").exists())
    device, placement = place(settings.computation.device, settings.computation.precision, world)
    data = open_data(settings.data, device, world)
    if data.info.num_classes != ticket.architecture.num_classes or data.info.channels != ticket.architecture.in_channels:
        raise LoftError(
            f"{data.info.name} has {data.info.num_classes} classes and {data.info.channels} channels, the ticket's network "
            f"{ticket.architecture.num_classes} and {ticket.architecture.in_channels}: retrain it on the data it was found on"
        )
    order = Order("split", data.info.train_images, settings.batch_size, settings.seed, world.rank, world.size)
    total_steps = settings.epochs * order.steps_per_epoch
    strategy = DataParallel(
        ticket.architecture, ticket.hidden_widths, starting_weights(ticket, settings.rewind), settings.optimisation, data, order,
        total_steps, settings.computation.precision, device, world,
    )  # fmt: skip
    placements = world.gather_objects(placement)
    details = {
        "architecture": ticket.architecture.to_json(),
        "hidden_widths": ticket.hidden_widths,
        "ticket": {"path": str(ticket.path), **ticket.provenance},
        "seed": settings.seed,
        "world_size": world.size,
        "placement": [asdict(each) for each in placements],
        "data": data.info.to_json(),
        "total_steps": total_steps,
        "steps_per_epoch": order.steps_per_epoch,
    }
    checkpoint = Run.open(path).read_checkpoint() if going_on else None
    run = world.on_root(lambda: Run.create_or_resume(path, going_on, "retrain", to_json(settings), details))
    session = Session(
        strategy, ticket.architecture, ticket.hidden_widths, data, settings.optimisation, settings.evaluation,
        settings.snapshot_every, run, world, device, watcher,
    )  # fmt: skip
    return path, session.run(checkpoint)


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
