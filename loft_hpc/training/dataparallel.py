"""Synchronous data-parallel training: every rank the whole network, its part of each batch, one all-reduce of one flat gradient."""

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
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation, Optimisation
from loft_hpc.training.stopwatch import Stopwatch
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
        optimisation: Optimisation, data: DataSet, order: Order, total_steps: int, computation: Computation, device: torch.device, world: World,
        mask: Mapping[str, Tensor] | None = None, batch_parts: int | None = None, skipped_steps: int = 0,
    ):  # fmt: skip
        """`mask`: 0/1 over some of the parameters, which are held at zero where it is 0. `batch_parts`: see `Order.in_parts`.

        `skipped_steps`: steps of the schedule and of the data that were done before; `total_steps` come after them.
        """
        self.total_steps = total_steps
        self.steps_per_epoch = order.steps_per_epoch
        self.batch_images = sum(len(part.indices(0)) for part in order.in_parts(batch_parts))
        self.any_world_size = True
        self._orders, self._batch, self._data, self._world = order.in_parts(batch_parts), order.batch_size, data, world
        self.schedule = Schedule(optimisation, total_steps, order.steps_per_epoch, skipped_steps)
        self._groups = filter_groups(architecture)
        network = network_for(architecture, hidden_widths, initial, device, "the initial state")
        self._buffer = ParameterBuffer(dict(network.named_parameters()))
        self._trainer = Trainer(network, (self._buffer,), self.schedule, computation)
        self._mask = None if mask is None else flat_mask(mask, self._buffer)
        if self._mask is not None:
            self._buffer.values.mul_(self._mask)
        self._step = 0
        self._exchanging = Stopwatch(device)
        world.broadcast_(self._buffer.values, "shared")()

    def advance(self, limit: int | None = None) -> Advance:
        steps = min(STRETCH_STEPS, (limit or self.total_steps) - self._step, self.total_steps - self._step)
        losses = self._trainer.steps(
            self._world.paced(self._data.train_parts(self._orders, self._step + self.schedule.skipped_steps, steps)),
            self._step,
            global_batch=self._batch,
            combine_gradients=self._sum_gradients,
        )
        total, diverged_at = summed(losses, self._step, self._buffer.values)
        self._step += steps
        # A rank's loss is divided by the global batch: times the ranks it is a mean again.
        return Advance(self._step, total * self._world.size / steps, self._exchanging.take(), diverged_at=diverged_at)

    def _sum_gradients(self) -> None:
        with self._exchanging.running():
            self._world.all_reduce_(self._buffer.gradient, "gradient")()
        if self._mask is not None:
            # where the weight and its gradient are zero, momentum and weight decay stay zero too: nothing revives it
            self._buffer.gradient.mul_(self._mask)

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


def flat_mask(mask: Mapping[str, Tensor], buffer: ParameterBuffer) -> Tensor:
    """A mask over named parameters, laid out as the buffer; 1 for parameters that it does not name."""
    flat = torch.ones_like(buffer.values)
    for name, view in buffer.layout.views(flat).items():
        if name in mask:
            view.copy_(mask[name])
    return flat
