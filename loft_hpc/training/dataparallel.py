"""Synchronous data-parallel training: every rank the whole network, its part of each batch, one all-reduce of one flat gradient."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.scores import filter_scores
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.evaluation import network_for
from loft_hpc.training.settings import Optimisation
from loft_hpc.training.strategy import Advance, Strategy, bits, refuse_other_network, summed
from loft_hpc.training.trainer import Trainer

STRETCH_STEPS = 8


class DataParallel(Strategy):
    """One rank's side; `advance` is a few steps.

    The gradient is that of the mean loss over the global batch, however unevenly the ranks share it. Normalisation uses the
    statistics of a rank's part of the batch, as is usual.
    """

    def __init__(
        self, architecture: Architecture, hidden_widths: Mapping[str, int] | None, initial: Mapping[str, Tensor],
        optimisation: Optimisation, data: DataSet, order: Order, total_steps: int, precision: str, device: torch.device, world: World,
    ):  # fmt: skip
        self.total_steps = total_steps
        self.steps_per_epoch = order.steps_per_epoch
        self.batch_images = len(order.indices(0))
        self.any_world_size = True
        self._order, self._data, self._world = order, data, world
        self._groups = filter_groups(architecture)
        network = network_for(architecture, hidden_widths, initial, device, "the initial state")
        self._buffer = ParameterBuffer(dict(network.named_parameters()))
        self._trainer = Trainer(network, (self._buffer,), optimisation, total_steps, precision)
        self._step = 0
        self._exchange_seconds = 0.0
        world.broadcast_(self._buffer.values, "shared")()

    def advance(self, limit: int | None = None) -> Advance:
        steps = min(STRETCH_STEPS, (limit or self.total_steps) - self._step, self.total_steps - self._step)
        self._exchange_seconds = 0.0
        losses = self._trainer.steps(
            self._world.paced(self._data.train_batches(self._order, self._step, steps)),
            self._step,
            global_batch=self._order.batch_size,
            combine_gradients=self._sum_gradients,
        )
        total, diverged_at = summed(losses, self._step)
        self._step += steps
        # A rank's loss is divided by the global batch: times the ranks it is a mean again.
        return Advance(self._step, total * self._world.size / steps, self._exchange_seconds, diverged_at=diverged_at)

    def _sum_gradients(self) -> None:
        start = time.perf_counter()
        self._world.all_reduce_(self._buffer.gradient, "gradient")()
        self._exchange_seconds += time.perf_counter() - start

    def full_state(self) -> dict[str, Tensor]:
        return {name: view.clone() for name, view in self._buffer.views.items()}

    def filter_scores(self) -> dict[str, Tensor]:
        return filter_scores(self._buffer.views, self._groups)

    def digest(self) -> int:
        return bits(self._buffer.values) + bits(self._buffer.momentum)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        momentum = self._buffer.layout.views(self._buffer.momentum)
        tensors = {f"parameters/{name}": view for name, view in self.full_state().items()}
        return tensors | {f"momentum/{name}": view.clone() for name, view in momentum.items()}, {}

    def restore(self, checkpoint: Checkpoint) -> None:
        targets = {f"parameters/{name}": view for name, view in self._buffer.views.items()}
        targets |= {f"momentum/{name}": view for name, view in self._buffer.layout.views(self._buffer.momentum).items()}
        tensors = checkpoint.tensors
        refuse_other_network(tensors, targets)
        for name, target in targets.items():
            target.copy_(tensors[name])
        self._step = checkpoint.step
