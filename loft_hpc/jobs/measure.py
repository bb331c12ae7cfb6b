"""`loft measure`: what runs and tickets on disk are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from loft_hpc.analysis.latency import Latency, latencies
from loft_hpc.analysis.size import Size, network_size
from loft_hpc.comm.world import World
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import RetrainSettings, ticket_data, ticket_evaluation
from loft_hpc.jobs.settings import from_json
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import Score, judge, network_for
from loft_hpc.training.settings import Evaluation


@dataclass(frozen=True)
class Subject:
    """A network on disk, whichever kind of folder it lies in."""

    path: Path
    kind: str
    """`run`, `retrained` or `ticket`."""
    architecture: Architecture
    hidden_widths: dict[str, int] | None
    state: dict[str, Tensor]
    data: DataSettings
    evaluation: Evaluation


@dataclass(frozen=True)
class Measured:
    subject: Subject
    score: Score
    size: Size
    dense: Size
    latency: Latency
    dense_latency: Latency


def open_subject(path: Path) -> Subject:
    """A pretraining run, a retraining run, or a ticket. Raises LoftError where `path` is none of them."""
    if (path / "ticket.json").is_file():
        ticket = Ticket.read(path)
        return Subject(
            path, "ticket", ticket.architecture, ticket.hidden_widths, ticket.state, ticket_data(ticket), ticket_evaluation(ticket)
        )
    if not (path / "run.json").is_file():
        raise LoftError(f"{path} is neither a run nor a ticket: give a folder that loft pretrain, prune or retrain printed")
    run = Run.open(path)
    if run.description.get("kind") == "retrain":
        settings = from_json(RetrainSettings, run.configuration)
        return Subject(path, "retrained", run.architecture, run.hidden_widths, run.read_model(), settings.data, settings.evaluation)
    settings = settings_of(run)
    return Subject(path, "run", run.architecture, None, run.read_model(), settings.data, settings.evaluation)


def measure(paths: Sequence[Path], data_dir: str | None, batch_size: int, repetitions: int, device: str, world: World) -> list[Measured]:
    """Accuracy (all ranks take part), size, and latency beside the dense network's (on rank 0 alone). Collective.

    Statistics of a ticket are re-estimated before it is scored: those that it was cut out with belong to the dense network.
    """
    subjects = [open_subject(path) for path in paths]
    chosen_device, _ = place(device, "float32", world)
    results = []
    for subject in subjects:
        data = open_data(subject.data.at(data_dir), chosen_device, world)
        network = network_for(subject.architecture, subject.hidden_widths, subject.state, chosen_device, str(subject.path))
        scored = judge(network, data, subject.evaluation, world)
        size = network_size(subject.architecture, subject.hidden_widths, data.info.image_size)
        dense_size = network_size(subject.architecture, None, data.info.image_size)
        image = (data.info.channels, data.info.image_size, data.info.image_size)
        time_both = partial(_latencies, network, subject.architecture, image, batch_size, repetitions)
        mine, dense_time = world.on_root(time_both)
        results.append(Measured(subject, scored, size, dense_size, mine, dense_time))
    return results


def _latencies(
    network: nn.Module, architecture: Architecture, image: tuple[int, int, int], batch_size: int, repetitions: int
) -> list[Latency]:
    """The network's and the dense network's; the latter's weights do not matter."""
    device = next(network.parameters()).device
    dense = build(architecture, seed=0).to(device, memory_format=torch.channels_last).eval()
    return latencies([network, dense], image, batch_size, repetitions)
