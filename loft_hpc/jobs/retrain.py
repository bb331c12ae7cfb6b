"""`loft retrain`: a ticket in, a run with its retrained network out."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from loft_hpc import seeds
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataInfo
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings
from loft_hpc.errors import LoftError
from loft_hpc.jobs.settings import from_json
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.jobs.training_run import destination, prepare, train_into
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import parameters_of
from loft_hpc.models.resnet import CLASSIFIER, new_classifier
from loft_hpc.runs.run import Run
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.session import Outcome
from loft_hpc.training.settings import (
    MAX_BATCH,
    MAX_EPOCHS,
    MAX_SEED,
    Checkpointing,
    Computation,
    Evaluation,
    Optimisation,
    Snapshots,
    refuse_outside,
)
from loft_hpc.training.watching import Oversight

LEARNING_RATE = 0.03
"""Default at the start of retraining: the weights are trained already (docs/decisions/0008)."""


@dataclass(frozen=True)
class RetrainSettings:
    """Everything that decides a retraining run, but for the ticket and the number of ranks."""

    strategy: ClassVar[str] = "data-parallel"
    rewind: str = "none"
    """Weights to start from: `none` (as pruned), `init` (before pretraining) or `epoch:K` (a snapshot of pretraining)."""
    epochs: int = 10
    batch_size: int = 128
    """Images per step of all ranks together: every rank normalises by its own part, which should not become tiny."""
    batch_parts: int | None = None
    """Parts that every batch is computed in, whatever the number of ranks; None for one for each rank."""
    seed: int = 0
    transfer: bool = False
    """Whether `data` may be other ones than the ticket was found on: the classifier is initialised anew where the classes differ."""
    new_classifier: bool = False
    """Whether it is drawn anew in any case."""
    data: DataSettings = field(default_factory=DataSettings)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(lr=LEARNING_RATE))
    evaluation: Evaluation = field(default_factory=Evaluation)
    computation: Computation = field(default_factory=Computation)
    snapshots: Snapshots = field(default_factory=lambda: Snapshots(snapshot_every="0"))
    checkpoints: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self):
        if self.rewind != "none":
            snapshot_name(self.rewind, "--rewind")
        if not 1 <= self.epochs <= MAX_EPOCHS or self.batch_size < 1:
            raise LoftError(f"--epochs must lie between 1 and {MAX_EPOCHS:,}, and --batch-size be at least 1", usage=True)
        if self.batch_parts is not None and not 1 <= self.batch_parts <= self.batch_size:
            raise LoftError(f"--batch-parts {self.batch_parts} must lie between 1 and --batch-size", usage=True)
        refuse_outside(self, seed=(0, MAX_SEED), batch_size=(1, MAX_BATCH))


def snapshot_name(point: str, option: str) -> str:
    """The snapshot that `init`, `epoch:K` or `step:K` means. Raises LoftError, naming the option, for anything else."""
    match = re.fullmatch(r"init|(epoch|step):(\d{1,9})", point)
    if not match:
        raise LoftError(f"{option} {point} is not known: snapshots are named init, epoch:K or step:K with a whole number K", usage=True)
    return f"step-{int(match[2]):06d}" if match[1] == "step" else f"epoch-{int(match[2] or 0):03d}"


def starting_weights(ticket: Ticket, rewind: str) -> dict[str, Tensor]:
    """The ticket's parameters at the point that `rewind` names. Raises LoftError where the run has no such snapshot."""
    if rewind == "none":
        return parameters_of(ticket.state)
    if not (ticket.run_path / "run.json").is_file():
        raise LoftError(
            f"{ticket.path} does not lie in its run any more (RUN/tickets/NAME), so there is nothing to rewind to: move it back"
        )
    return ticket.carve(Run.open(ticket.run_path).snapshots.read(snapshot_name(rewind, "--rewind")))


def ticket_data(ticket: Ticket) -> DataSettings:
    """The data set that the ticket was found on."""
    return from_json(DataSettings, ticket.provenance.get("data", {}))


def ticket_evaluation(ticket: Ticket) -> Evaluation:
    """How the ticket's run was judged, and so the ticket."""
    return from_json(Evaluation, ticket.provenance.get("evaluation", {}))


def other_data(ticket: Ticket, dataset: str, **given: Any) -> DataSettings:
    """A data set to transfer the ticket to: `given` fields where they are not None, else the ticket's if it is one of that name."""
    own = ticket_data(ticket)
    base = own if own.dataset == dataset else DataSettings(loader_workers=own.loader_workers)
    return replace(base, dataset=dataset, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class _Start:
    """What a retraining starts from."""

    network: Architecture
    dense: Architecture
    parameters: dict[str, Tensor]
    mask: dict[str, Tensor] | None
    new_classifier: str | None
    """Why the classifier is not the ticket's; None where it is."""
    note: str | None


def _start(ticket: Ticket, settings: RetrainSettings, info: DataInfo) -> _Start:
    """The ticket, with a new classifier where the data ask for one and the settings allow it. The stem stays the ticket's."""
    own, parameters, mask = TrainedOn.of(ticket.path, ticket.dense), starting_weights(ticket, settings.rewind), ticket.mask.weights
    own.refuse_other_channels(info)
    why = own.other_classes(info) if settings.transfer or settings.new_classifier else None
    if settings.new_classifier:
        why = why or "as asked for by --new-classifier"
    if why is None:
        note = f"the classifier is the ticket's: {info.name} has the same classes" if settings.transfer else meet(own, info)
        return _Start(ticket.architecture, ticket.dense, parameters, mask, None, note)
    network, dense = (replace(one, num_classes=info.num_classes) for one in (ticket.architecture, ticket.dense))
    parameters = parameters | new_classifier(network, seeds.derive(settings.seed, "init", 2))
    if mask is not None:
        mask = {name: kept for name, kept in mask.items() if not name.startswith(CLASSIFIER)}
    return _Start(network, dense, parameters, mask, why, f"the classifier is initialised anew: {why}")


def retrain(
    ticket: Ticket, settings: RetrainSettings, path: Path | None, resume: bool, world: World, oversight: Oversight
) -> tuple[Path, Outcome]:
    """Train a ticket data-parallel over all ranks, and leave a complete run at `path`. Collective. `resume` is as for `pretrain`."""
    where = destination(settings, path, resume, world)
    if where.earlier:
        _refuse_other_ticket(where.earlier, ticket)
    if where.finished:
        return where.path, where.finished
    workplace = prepare(settings, world)
    info = workplace.data.info
    start = _start(ticket, settings, info)
    if start.note:
        oversight.watcher.noted(start.note)
    order = Order("split", info.train_images, settings.batch_size, settings.seed, world.rank, world.size)
    strategy = DataParallel(
        start.network, ticket.hidden_widths, start.parameters, settings.optimisation, workplace.data, order,
        settings.epochs * order.steps_per_epoch, settings.computation, workplace.device, world,
        start.mask, settings.batch_parts,
    )  # fmt: skip
    details = {
        "hidden_widths": ticket.hidden_widths,
        "dense_architecture": start.dense.to_json(),
        **({} if start.new_classifier is None else {"new_classifier": start.new_classifier}),
        "ticket": {"path": os.path.abspath(ticket.path), "sha256": ticket.fingerprint, "kind": ticket.mask.kind, **ticket.provenance},
    }
    where = where.claimed((ticket.architecture.model, settings.data.dataset, "retrain"), world)
    outcome = train_into(
        where, "retrain", strategy, settings, start.network, ticket.hidden_widths, details, order, workplace, world, oversight
    )
    return where.path, outcome


def _refuse_other_ticket(run: Run, ticket: Ticket) -> None:
    """A run goes on with the ticket that it was started with."""
    own = run.required("ticket", dict)
    if own.get("sha256") not in ticket.fingerprints:
        raise LoftError(f"{run.path} retrains another ticket, {own.get('path')}: resume it with that one")
