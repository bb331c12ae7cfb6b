"""`loft measure`: what runs and tickets on disk are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loft_hpc.analysis.energy import WORLD_GRAMS_PER_KWH, InferenceEnergy, Meter, gpus_of, inference_energy
from loft_hpc.analysis.footprint import Footprint, footprint
from loft_hpc.analysis.latency import Latency, latencies
from loft_hpc.analysis.robustness import (
    ATTACKS,
    CORRUPTIONS,
    SEVERITIES,
    Attack,
    Corruption,
    attacked_score,
    corrupted_accuracy,
    corrupted_score,
)
from loft_hpc.analysis.size import Size, network_size, ticket_size
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet, TensorDataSet
from loft_hpc.data.inputs import NetworkInput
from loft_hpc.data.registry import CIFAR, DataSettings, Reading, open_data
from loft_hpc.data.shifted import CIFAR_C_CORRUPTIONS, cifar10_1, cifar10_2, cifar_c
from loft_hpc.errors import LoftError
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import RetrainSettings, ticket_data, ticket_evaluation
from loft_hpc.jobs.settings import from_json
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run
from loft_hpc.tickets.masks import weight_shapes
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import Score, judge, network_for, score
from loft_hpc.training.settings import MAX_IMAGES_AT_ONCE, Evaluation, refuse_outside

MAX_REPETITIONS, MAX_PGD_STEPS = 100_000, 10_000


@dataclass(frozen=True)
class Subject:
    """A network on disk, whichever kind of folder it lies in."""

    path: Path
    kind: str
    """`run`, `retrained` or `ticket`."""
    architecture: Architecture
    hidden_widths: dict[str, int] | None
    state: dict[str, Tensor]
    dense: Architecture
    """The network that it is a ticket of; its own where it is none."""
    kept: dict[str, Tensor] | None
    """0/1 over weights that are held at zero; None where there is no such mask."""
    data: DataSettings
    evaluation: Evaluation
    input: NetworkInput | None = None
    """How to feed it; None where an earlier version made it."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Of a ticket and of a retrained one: its method, ratio, run and so on, as they stand in a file."""


@dataclass(frozen=True)
class Robustness:
    """Accuracies, 0 to 1, of a network that was trained on clean images."""

    attacks: dict[str, float]
    """By attack."""
    corruptions: dict[str, float]
    """By corruption, meaned over the severities looked at."""
    shifted: dict[str, float]
    """Of test sets on disk, by name."""

    @property
    def corrupted(self) -> float:
        """Mean over the corruptions."""
        return sum(self.corruptions.values()) / len(self.corruptions)


@dataclass(frozen=True)
class Measured:
    subject: Subject
    score: Score
    size: Size
    dense: Size
    latency: Latency
    dense_latency: Latency
    footprint: Footprint
    dense_footprint: Footprint
    energy: tuple[InferenceEnergy, InferenceEnergy] | None = None
    """Of the network and of the dense one."""
    robustness: Robustness | None = None
    note: str | None = None
    """About the images that it was measured on."""

    @property
    def training_memory_share(self) -> float | None:
        """Of the dense network's memory in training; None for a batch of one image, which is not trained on."""
        mine, dense = self.footprint.training_bytes, self.dense_footprint.training_bytes
        return None if mine is None or dense is None else mine / dense


def open_subject(path: Path) -> Subject:
    """A pretraining run, a retraining run, or a ticket. Raises LoftError where `path` is none of them."""
    if (path / "ticket.json").is_file():
        ticket = Ticket.read(path)
        return Subject(
            path, "ticket", ticket.architecture, ticket.hidden_widths, ticket.state, ticket.dense, ticket.mask.weights, ticket_data(ticket),
            ticket_evaluation(ticket), ticket.input, ticket.provenance,
        )  # fmt: skip
    if not (path / "run.json").is_file():
        raise LoftError(f"{path} is neither a run nor a ticket: give a folder that loft pretrain, prune or retrain printed")
    run = Run.open(path)
    if run.description.get("kind") == "retrain":
        settings = from_json(RetrainSettings, run.configuration)
        state, dense = run.read_model(), run.dense_architecture
        masked = isinstance(own := run.description.get("ticket"), dict) and own.get("kind") == "weight"
        if masked:
            network_for(dense, None, state, torch.device("cpu"), str(run.model_path))
        kept = {name: (state[name] != 0).to(torch.uint8) for name in weight_shapes(dense)} if masked else None
        return Subject(
            path, "retrained", run.architecture, run.hidden_widths, state, dense, kept, settings.data, settings.evaluation,
            _input_of(run), run.description.get("ticket") or {},
        )  # fmt: skip
    settings = settings_of(run)
    return Subject(
        path, "run", run.architecture, None, run.read_model(), run.architecture, None, settings.data, settings.evaluation, _input_of(run)
    )  # fmt: skip


def _input_of(run: Run) -> NetworkInput | None:
    """None for runs of earlier versions. Raises LoftError where what run.json says of its data cannot be."""
    data = run.description.get("data") or {}
    if "mean" not in data:
        return None
    try:
        return NetworkInput.from_json(data)
    except ValueError as problem:
        raise LoftError(f"{run.path / 'run.json'} says of its data {problem}: restore it") from None


@dataclass(frozen=True)
class MeasureSettings:
    """What is looked at, and how long."""

    latency_batch: int = 64
    repetitions: int = 20
    robustness: bool = False
    epsilon: float = 8 / 255
    """Of FGSM and PGD, in units of the range of a pixel."""
    pgd_steps: int = 10
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    cifar_c: str | None = None
    """Folder of CIFAR-10-C or CIFAR-100-C."""
    cifar10_1: str | None = None
    cifar10_2: str | None = None
    energy: bool = False
    carbon_intensity: float = WORLD_GRAMS_PER_KWH
    """Grams of CO2 for a kilowatt-hour."""

    def __post_init__(self):
        refuse_outside(self, latency_batch=(1, MAX_IMAGES_AT_ONCE), repetitions=(2, MAX_REPETITIONS), pgd_steps=(1, MAX_PGD_STEPS))
        refuse_outside(self, epsilon=(0, 1), carbon_intensity=(0, 1e6))
        if not set(self.severities) <= set(SEVERITIES) or not self.severities:
            raise LoftError("--severity must lie between 1 and 5", usage=True)
        _attacks(self)

    @property
    def asks_for_robustness(self) -> bool:
        return self.robustness or any((self.cifar_c, self.cifar10_1, self.cifar10_2))


def _attacks(settings: MeasureSettings) -> list[Attack]:
    return [Attack(name, settings.epsilon, settings.pgd_steps) for name in ATTACKS]


def measure(paths: Sequence[Path], settings: MeasureSettings, reading: Reading, device: str, world: World) -> list[Measured]:
    """Accuracy and robustness (all ranks take part), size and memory; latency and energy beside the dense network's (on rank 0 alone).

    Collective. Statistics are re-estimated before a network is scored: tickets of earlier versions have the dense network's.
    """
    subjects = [open_subject(path) for path in paths]
    _refuse_missing(subjects, settings)
    chosen_device, _ = place(device, "float32", world)
    return [_measure(subject, settings, reading, chosen_device, world) for subject in subjects]


def _refuse_missing(subjects: Sequence[Subject], settings: MeasureSettings) -> None:
    """What cannot be measured is told before anything is."""
    asked = {"--cifar-c": settings.cifar_c, "--cifar10-1": settings.cifar10_1, "--cifar10-2": settings.cifar10_2}
    for option, folder in asked.items():
        if folder is None:
            continue
        for subject in subjects:
            if subject.data.dataset not in (CIFAR if option == "--cifar-c" else ("cifar10",)):
                raise LoftError(f"{option} belongs to CIFAR, and {subject.path} to {subject.data.dataset}: omit it", usage=True)
        if not Path(folder).is_dir():
            raise LoftError(f"{option} {folder} is no folder: name the one that holds its files")


def _measure(subject: Subject, settings: MeasureSettings, reading: Reading, device: torch.device, world: World) -> Measured:
    data = open_data(subject.data.read(reading), device, world)
    note = meet(TrainedOn.of(subject.path, subject.dense), data.info)
    network = network_for(subject.architecture, subject.hidden_widths, subject.state, device, str(subject.path))
    scored = judge(network, data, subject.evaluation, world)
    size = data.info.image_size
    image = (data.info.channels, size, size)
    networks = [network, build(subject.dense, seed=0).to(device, memory_format=torch.channels_last).eval()]  # whose weights do not matter
    mine, dense = world.on_root(lambda: latencies(networks, image, settings.latency_batch, settings.repetitions))
    energies = None
    if settings.energy:
        meter = Meter(gpus_of(device))
        energies = tuple(world.on_root(lambda: inference_energy(networks, image, settings.latency_batch, settings.repetitions, meter)))
    return Measured(
        subject, scored, ticket_size(subject.architecture, subject.hidden_widths, subject.kept, size), network_size(subject.dense, None, size),
        mine, dense, footprint(subject.architecture, subject.hidden_widths, size, settings.latency_batch),
        footprint(subject.dense, None, size, settings.latency_batch), energies,
        _robustness(network, data, subject, settings, world) if settings.asks_for_robustness else None, note,
    )  # fmt: skip


def _robustness(network: nn.Module, data: DataSet, subject: Subject, settings: MeasureSettings, world: World) -> Robustness:
    batch = subject.evaluation.evaluation_batch
    attacks: dict[str, float] = {}
    corruptions: dict[str, float] = {}
    if settings.robustness:
        attacks = {attack.name: attacked_score(network, data, attack, batch, world).accuracy for attack in _attacks(settings)}
        scores = {
            corruption: corrupted_score(network, data, corruption, batch, world)
            for corruption in (Corruption(name, severity) for name in CORRUPTIONS for severity in settings.severities)
        }
        corruptions = dict(corrupted_accuracy(scores).by_corruption)
    return Robustness(attacks, corruptions, _shifted(network, data, subject, settings, world))


def _shifted(network: nn.Module, data: DataSet, subject: Subject, settings: MeasureSettings, world: World) -> dict[str, float]:
    sets: dict[str, Callable[[], DataSet]] = {}
    if settings.cifar_c:
        for name in CIFAR_C_CORRUPTIONS:
            for severity in settings.severities:
                sets[f"{name} {severity}"] = partial(cifar_c, data, Path(settings.cifar_c), name, severity)
    if settings.cifar10_1:
        sets["cifar10.1"] = partial(cifar10_1, data, Path(settings.cifar10_1))
    if settings.cifar10_2:
        sets["cifar10.2"] = partial(cifar10_2, data, Path(settings.cifar10_2))
    if sets and not isinstance(data, TensorDataSet):
        raise LoftError(f"{data.info.name} has no shifted test sets: --cifar-c, --cifar10-1 and --cifar10-2 belong to CIFAR", usage=True)
    # one at a time: all of CIFAR-10-C is gigabytes
    return {name: score(network, open_set(), subject.evaluation, world).accuracy for name, open_set in sets.items()}
