"""What a finder works on: a run's networks and data, a way to train, and what all of that costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import FilterGroup
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.runs.run import Run
from loft_hpc.tickets.ticket import Cost
from loft_hpc.training.settings import Computation, Optimisation
from loft_hpc.training.strategy import Strategy

FINAL, INITIAL = "final", "init"


@dataclass(frozen=True)
class Recipe:
    """How a search trains, where it is not as the run was trained."""

    epochs: int | None = None
    lr: float | Callable[[int], float] | None = None
    """Learning rate, or what it is for a number of steps."""
    weight_decay: float | None = None
    details: Mapping[str, Any] | None = None
    """What else the search is made with: for its run.json, and to tell it from another one of the same name."""


@dataclass(frozen=True)
class Workshop:
    """What a search is made of, resolved."""

    architecture: Architecture
    data: DataSet
    order: Order
    total_steps: int
    optimisation: Optimisation
    batch_parts: int | None
    seed: int
    computation: Computation
    device: torch.device
    world: World


@dataclass(frozen=True)
class Trained:
    """A search that came to its end."""

    run: Run
    cost: Cost

    def last_checkpoint(self, names: Sequence[str], architecture: Architecture) -> dict[str, Tensor]:
        """Flat tensors of the strategy at its end, one number for each parameter. Raises LoftError where they are none of this network's."""
        tensors = self.run.checkpoints.read(self.run.required("total_steps", int)).tensors
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in ResidualNetwork(architecture, architecture.hidden_widths()).parameters())
        for name in names:
            if name not in tensors or tensors[name].shape != (size,) or tensors[name].dtype != torch.float32:
                raise LoftError(f"{self.run.path} ended with no {name} of this network: remove it, and search again")
        return tensors


class Source(Protocol):
    """A run, as finders see it. Its collective methods are called by every rank alike."""

    run: Run
    architecture: Architecture
    groups: Sequence[FilterGroup]
    """Whose filters may be removed."""
    at: str
    """The network to draw from, as commands name it: `final`, `init`, `epoch:K` or `step:K`."""
    seed: int
    """Of the run."""
    epochs: int
    """Of the run; the budget of a search that is given none."""
    steps_per_epoch: int
    """Of a search."""
    world: World
    data: DataSet
    """Opened when it is first asked for. Collective."""

    def state(self, at: str) -> dict[str, Tensor]:
        """The run's full network at a point. Raises LoftError where the run has none there."""

    def file(self, at: str) -> str:
        """Where that network lies, relative to the run."""

    def network(self, at: str) -> ResidualNetwork:
        """That network on the device, in evaluation mode, its normalisation statistics re-estimated. Collective."""

    def cost(self, at: str) -> Cost:
        """What the run took until then."""

    def train(self, name: str, recipe: Recipe, make: Callable[[Workshop], Strategy]) -> Trained:
        """Run a search into RUN/searches/NAME, or go on with it, or find it done. Collective."""
