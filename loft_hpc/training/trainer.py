"""Local SGD steps on one network, whichever it is: a full network, a sub-network, a ticket."""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from loft_hpc.data.dataset import Batch
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation


def named_subset(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The network's parameters whose names are in `names`, in the network's order."""
    wanted = set(names)
    return {name: parameter for name, parameter in network.named_parameters() if name in wanted}


def stop_statistics(network: nn.Module) -> None:
    """Let normalisations use batch statistics in training and record none.

    Those that a sub-network sees are not those of the merged network, so they are never kept: before every evaluation
    `evaluation.reestimate_statistics` computes them for the network that is evaluated.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False


@torch.no_grad()
def sgd_step(
    values: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor], lr: float, momentum: float, weight_decay: float
) -> None:
    """A step of torch's SGD on tensors with their gradients and momentum buffers.

    Its functional form, bit by bit what the class does; to make one of the class, torch loads its compiler, which takes two seconds.
    """
    sgd(
        list(values), list(gradients), list(momenta),
        lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=0, nesterov=False, maximize=False,
    )  # fmt: skip


class FlatSGD:
    """torch's SGD over flat buffers, with a learning rate that is a function of the step."""

    def __init__(self, buffers: Sequence[ParameterBuffer], schedule: Schedule):
        self._buffers = [buffer for buffer in buffers if buffer.layout.numel]
        self._schedule = schedule

    def zero_gradients(self) -> None:
        for buffer in self._buffers:
            buffer.gradient.zero_()

    def step(self, number: int) -> None:
        """Update the parameters; `number` counts from 0 over the whole training."""
        values, gradients, momenta = zip(*((one.values, one.gradient, one.momentum) for one in self._buffers), strict=True)
        optimisation = self._schedule.optimisation
        sgd_step(values, gradients, momenta, self._schedule.lr_at(number), optimisation.momentum, optimisation.weight_decay)

    def reset_momentum(self) -> None:
        for buffer in self._buffers:
            buffer.momentum.zero_()


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network's forward and backward pass by torch.compile, on a GPU recorded as CUDA graphs.

    It compiles at its first batch, once for each size of a batch: a LoFT worker keeps its parameters' shapes and addresses in all rounds.
    """
    device = next(network.parameters()).device
    if device.type == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says that it found no CUDA
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


class Trainer:
    """A network, its parameters in flat buffers, and SGD over those buffers."""

    def __init__(self, network: nn.Module, buffers: Sequence[ParameterBuffer], schedule: Schedule, computation: Computation):
        self._autocast = computation.precision == "bfloat16"
        self._sgd = FlatSGD(buffers, schedule)
        stop_statistics(network)
        network.train()
        self._forward: Callable[[Tensor], Tensor] = compiled(network) if computation.compile else network

    def reset_momentum(self) -> None:
        self._sgd.reset_momentum()

    def steps(
        self,
        batches: Iterable[Sequence[Batch]],
        first_step: int,
        global_batch: int | None = None,
        combine_gradients: Callable[[], None] | None = None,
    ) -> Tensor:
        """One SGD step on each batch, `first_step` being the first one's number; returns their losses, (steps,).

        A batch comes in parts, usually one; each goes through the network by itself. With `global_batch`, it is this rank's share of one of
        that size: its loss is divided by the whole batch's size, and `combine_gradients` sums the gradients over the ranks before each step.
        """
        losses = []
        for step, parts in enumerate(batches, start=first_step):
            self._sgd.zero_gradients()
            images = global_batch or sum(len(labels) for _, labels in parts)
            losses.append(sum(accumulate_gradients(self._forward, part, images, self._autocast) for part in parts))
            if combine_gradients:
                combine_gradients()
            self._sgd.step(step)
        return torch.stack(losses)


def accumulate_gradients(network: Callable[[Tensor], Tensor], part: Batch, batch_images: int, autocast: bool) -> Tensor:
    """Add the gradients of a part of a batch of `batch_images`; returns its share of the mean loss."""
    images, labels = part
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        output = network(images)
    loss = F.cross_entropy(output.float(), labels, reduction="sum") / batch_images
    loss.backward()
    return loss.detach()
