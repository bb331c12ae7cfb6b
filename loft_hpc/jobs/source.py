"""A pretraining run as finders see it: its networks and data, and the searches that they run in its folder."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.data.registry import AS_SET, DataSettings, Reading, open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.cost import cost_of
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import snapshot_name
from loft_hpc.jobs.settings import CHANGEABLE, leaves, to_json
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.jobs.training_run import destination, prepare, train_into
from loft_hpc.models.groups import FilterGroup, filter_groups
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.runs.run import Run
from loft_hpc.tickets.source import FINAL, Recipe, Trained, Workshop
from loft_hpc.tickets.ticket import Cost
from loft_hpc.training.device import place, precision_here
from loft_hpc.training.evaluation import network_for, reestimate_statistics
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots
from loft_hpc.training.strategy import Strategy
from loft_hpc.training.watching import Oversight

BLOCK_CHOICES = ("all", "release")


@dataclass(frozen=True)
class SearchSettings:
    """Everything that decides a search, but for the number of ranks."""

    epochs: int
    batch_size: int
    """Images per step of all ranks together."""
    seed: int
    batch_parts: int | None
    data: DataSettings
    optimisation: Optimisation
    evaluation: Evaluation
    computation: Computation
    snapshots: Snapshots = field(default_factory=lambda: Snapshots(snapshot_every="0"))
    checkpoints: Checkpointing = field(default_factory=Checkpointing)


@dataclass(frozen=True)
class Surroundings:
    """Where tickets are drawn and searched for: nothing of it decides which."""

    world: World
    oversight: Oversight
    reading: Reading = AS_SET
    device: str = "auto"
    batch_parts: int | None = None
    """Parts of a search's batches (`Order.in_parts`); None for one for each rank."""


def prunable_groups(groups: tuple[FilterGroup, ...], blocks: str) -> list[FilterGroup]:
    """`all`: every residual block. `release`: as in LoFT's release, all but the first block of each stage."""
    if blocks == "all":
        return list(groups)
    return [group for group in groups if not group.name.endswith(".0")]


class RunSource:
    """`tickets.source.Source` of a run on disk."""

    def __init__(self, run: Run, blocks: str, at: str, surroundings: Surroundings, name: str | None = None):
        """`name`: of the folder of its searches, in place of the finder's own."""
        self.run, self.at, self._around, self._name = run, at, surroundings, name
        self.settings = settings_of(run)
        self.architecture = run.architecture
        self.groups = prunable_groups(filter_groups(self.architecture), blocks)
        self.seed, self.world = self.settings.seed, surroundings.world
        # a run of so many rounds has no epochs of its own
        self.epochs = math.ceil(run.required("total_steps", int) / run.required("steps_per_epoch", int))
        self._states: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def device(self) -> torch.device:
        return place(self._around.device, "float32", self.world)[0]

    @cached_property
    def data(self) -> DataSet:
        data = open_data(self.settings.data.read(self._around.reading), self.device, self.world)
        meet(TrainedOn.of(self.run.path, self.architecture), data.info, continued=True)
        return data

    @property
    def steps_per_epoch(self) -> int:
        return self._order(self.data).steps_per_epoch

    def _order(self, data: DataSet) -> Order:
        return Order("split", data.info.train_images, self.settings.batch_size, self.seed, self.world.rank, self.world.size)

    def state(self, at: str) -> dict[str, Tensor]:
        if at not in self._states:
            state = self.run.read_model() if at == FINAL else self.run.snapshots.read(snapshot_name(at, "--at"))
            network_for(self.architecture, None, state, torch.device("cpu"), str(self.run.path / self.file(at)))
            self._states = {at: state}
        return self._states[at]

    def file(self, at: str) -> str:
        path = self.run.model_path if at == FINAL else self.run.snapshots.path(snapshot_name(at, "--at"))
        return str(path.relative_to(self.run.path))

    def network(self, at: str) -> ResidualNetwork:
        network = network_for(self.architecture, None, self.state(at), self.device, str(self.run.path / self.file(at)))
        reestimate_statistics(network, self.data, self.settings.evaluation, self.world)
        return network

    def cost(self, at: str) -> Cost:
        return cost_of(self.run, None if at == FINAL else self.run.snapshots.step(snapshot_name(at, "--at")))

    def train(self, name: str, recipe: Recipe, make: Callable[[Workshop], Strategy]) -> Trained:
        run = self.settings
        epochs = recipe.epochs or self.epochs
        lr = recipe.lr(epochs * self.steps_per_epoch) if callable(recipe.lr) else recipe.lr
        optimisation = replace(
            run.optimisation,
            restarts=(),
            lr=lr or run.optimisation.lr,
            weight_decay=run.optimisation.weight_decay if recipe.weight_decay is None else recipe.weight_decay,
        )
        device = self._around.device
        computation = replace(run.computation, device=device, precision=precision_here(run.computation.precision, device), compile=False)
        settings = SearchSettings(
            epochs, run.batch_size, run.seed, self._around.batch_parts, run.data.read(self._around.reading), optimisation,
            replace(run.evaluation, evaluate_every=max(run.evaluation.evaluate_every, epochs)), computation,
        )  # fmt: skip
        method, *level = name.split("/")
        path = self.run.path.joinpath("searches", self._name or method, *level)
        details = dict(recipe.details or {})
        where = destination(settings, path, True, self.world)
        if where.earlier:
            _refuse_other_search(where.earlier, settings, details)
        if not where.finished:
            self._train(settings, where, details, make)
        search = Run.open(path)
        return Trained(search, cost_of(search))

    def _train(self, settings: SearchSettings, where: Any, details: dict, make: Callable[[Workshop], Strategy]) -> None:
        workplace = replace(prepare(settings, self.world), data=self.data)
        order = self._order(self.data)
        shop = Workshop(
            self.architecture, workplace.data, order, settings.epochs * order.steps_per_epoch, settings.optimisation, settings.batch_parts,
            details.get("seed", settings.seed), settings.computation, workplace.device, self.world,
        )  # fmt: skip
        self.world.ledger = Ledger()  # each search counts its own
        train_into(
            where, "search", make(shop), settings, self.architecture, None, {"search": details}, order, workplace, self.world,
            self._around.oversight,
        )  # fmt: skip


def _refuse_other_search(run: Run, settings: SearchSettings, details: dict) -> None:
    """A search goes on as it was begun. Raises LoftError, naming the first difference."""
    before = {"leave_out": []} | leaves(run.configuration) | leaves({"search": run.description.get("search") or {}})
    now = leaves(to_json(settings)) | leaves({"search": details})
    for name, value in now.items():
        if name not in CHANGEABLE and before.get(name) != value:
            raise LoftError(
                f"{run.path} was searched with {name.replace('_', ' ')} {before.get(name)}, not {value}: repeat that, or give another --name"
            )
