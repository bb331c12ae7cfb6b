"""GPipe-style pipeline training: the baseline that LoFT's communication is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_hpc.comm.messages import Messages
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import everything, filter_groups
from loft_hpc.models.scores import filter_scores
from loft_hpc.pipeline.pipeline import Pipeline
from loft_hpc.pipeline.stages import Stage, check_split, cuts, parts
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.evaluation import network_for
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import MAX_BATCH, Computation, Optimisation, refuse_outside
from loft_hpc.training.strategy import Advance, Strategy, everybodys_scores, refuse_other_network, summed
from loft_hpc.training.trainer import FlatSGD, stop_statistics

STRETCH_STEPS = 8


@dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline adds to ordinary training."""

    micro_batches: int = 4
    """Parts that each batch is cut into; normalisation sees one of them at a time."""
    split: str = "stages"
    """Where the network is cut: `stages`, `balanced`, or the numbers of the blocks to cut after, as in `3,7,13`."""
    recompute: bool = False
    """Keep a micro-batch's input alone and compute its activations again for the backward pass: less memory, a third more work."""

    def __post_init__(self):
        refuse_outside(self, micro_batches=(1, MAX_BATCH))
        check_split(self.split)

    def check_batch(self, batch_size: int) -> None:
        """Raises LoftError unless a batch can be cut into micro-batches that normalisation can work with."""
        if batch_size % self.micro_batches:
            raise LoftError(
                f"--batch-size {batch_size} cannot be cut into {self.micro_batches} equal micro-batches: make it a multiple of them",
                usage=True,
            )
        if batch_size // self.micro_batches < 2:
            raise LoftError(
                f"--batch-size {batch_size} in {self.micro_batches} micro-batches leaves them one image, and normalisation needs 2",
                usage=True,
            )


class GPipe(Strategy):
    """One rank's stage of the pipeline; `advance` is a few steps.

    Every step equals that of a single process which accumulates gradients over the same micro-batches, to the last bit where the two
    use the same kernels. `order` is the same on all ranks: the first stage sees the images, the last one the labels.
    """

    def __init__(
        self, architecture: Architecture, initial: Mapping[str, Tensor], settings: PipelineSettings, optimisation: Optimisation,
        data: DataSet, order: Order, total_steps: int, computation: Computation, device: torch.device, world: World,
    ):  # fmt: skip
        settings.check_batch(order.batch_size)
        self.total_steps = total_steps
        self.steps_per_epoch = order.steps_per_epoch
        self.schedule = Schedule(optimisation, total_steps, order.steps_per_epoch)
        self.batch_images = order.batch_size
        self._data, self._order, self._world, self._device = data, order, world, device
        self.cuts = cuts(architecture, settings.split, world.size, data.info.image_size)
        self._parts = parts(architecture, self.cuts)
        self._part = self._parts[world.rank]
        self._groups = filter_groups(architecture)
        shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
        self._layouts = [part.parameters(shapes, architecture) for part in self._parts]
        self._names = list(initial)
        network = network_for(architecture, None, initial, device, "the initial state")
        mine = self._layouts[world.rank].shapes
        self._buffer = ParameterBuffer({name: parameter for name, parameter in network.named_parameters() if name in mine})
        stage = Stage(network, self._part)
        stop_statistics(stage)
        stage.train()
        self._sgd = FlatSGD((self._buffer,), self.schedule)
        borders = self._part.borders(architecture.block_outputs(data.info.image_size))
        self._pipeline = Pipeline(
            stage, self._part, *borders, settings.micro_batches, order.batch_size, Messages(world),
            world.rank, settings.recompute, computation.precision == "bfloat16", device,
        )  # fmt: skip
        self._step = 0
        self._whole: dict[str, Tensor] | None = None

    def advance(self, limit: int | None = None) -> Advance:
        self._whole = None
        steps = min(STRETCH_STEPS, (limit or self.total_steps) - self._step, self.total_steps - self._step)
        losses = torch.zeros(steps, device=self._device)
        for place, (images, labels) in enumerate(self._world.paced(self._batches(steps))):
            self._sgd.zero_gradients()
            losses[place] = self._pipeline.step(images, labels)
            self._sgd.step(self._step + place)
        # The last stage alone knows the losses; rank 0 shows them.
        self._world.broadcast_(losses, "control", root=self._world.size - 1)()
        total, diverged_at = summed(losses, self._step, self._buffer.values)
        self._step += steps
        return Advance(self._step, total / steps, self._pipeline.waiting.take(), diverged_at=diverged_at)

    def _batches(self, steps: int):
        """(images, labels) of each step, None for what this stage has no use for."""
        begins, ends = self._part.begins, self._part.ends
        if begins:
            for images, labels in self._data.train_batches(self._order, self._step, steps):
                yield images, labels if ends else None
        elif ends:
            for labels in self._data.train_labels(self._order, self._step, steps):
                yield None, labels
        else:
            yield from ((None, None) for _ in range(steps))

    def full_state(self) -> dict[str, Tensor]:
        if self._whole is None:
            self._whole = self._gather(self._buffer.values)
        return dict(self._whole)

    def filter_scores(self) -> dict[str, Tensor]:
        return everybodys_scores(filter_scores(self._buffer.views, self._groups), everything(self._groups), self._groups, self._world)

    def _gather(self, mine: Tensor) -> dict[str, Tensor]:
        """All stages' parameters (or momentum), by name."""
        counts = [layout.numel for layout in self._layouts]
        gathered = torch.empty(sum(counts), device=mine.device)
        self._world.all_gather(mine, gathered, counts, "merge")()
        whole = {}
        for layout, piece in zip(self._layouts, gathered.split(counts), strict=True):
            whole |= layout.views(piece)
        return {name: whole[name] for name in self._names}

    def digest(self) -> int:
        return 0  # no stage has what another has

    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"parameters/{name}": view for name, view in self.full_state().items()}
        return tensors | {f"momentum/{name}": view for name, view in self._gather(self._buffer.momentum).items()}, {}

    def restore(self, checkpoint: Checkpoint) -> None:
        tensors, whole = checkpoint.tensors, self.full_state()
        refuse_other_network(tensors, {f"{kind}/{name}": tensor for kind in ("parameters", "momentum") for name, tensor in whole.items()})
        momentum = self._buffer.layout.views(self._buffer.momentum)
        for name, view in self._buffer.views.items():
            view.copy_(tensors[f"parameters/{name}"])
            momentum[name].copy_(tensors[f"momentum/{name}"])
        self._step = checkpoint.step
        self._whole = {name: tensors[f"parameters/{name}"] for name in self._names}
