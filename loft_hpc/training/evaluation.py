"""Judging a full network: normalisation statistics first, then accuracy and loss over the test images, all ranks taking part."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import ResidualNetwork, build
from loft_hpc.training.settings import Evaluation


@dataclass(frozen=True)
class Score:
    """How a network does on the test images."""

    correct: int
    images: int
    loss: float
    """Mean cross-entropy."""

    @property
    def accuracy(self) -> float:
        """Share of test images classified rightly, from 0 to 1."""
        return self.correct / self.images


def network_for(
    architecture: Architecture, hidden_widths: Mapping[str, int] | None, state: Mapping[str, Tensor], device: torch.device, where: str
) -> ResidualNetwork:
    """A network with the parameters of `state` (statistics too, where it has them), channels last, on `device`.

    Raises LoftError, naming `where` the state came from, if it belongs to another network.
    """
    network = build(architecture, hidden_widths)
    try:
        with torch.no_grad():
            own = network.state_dict()
            strange = state.keys() - own.keys()
            missing = dict(network.named_parameters()).keys() - state.keys()
            if strange or missing:
                raise ValueError(f"{sorted(strange or missing)[0]} is {'unknown to' if strange else 'missing for'} this network")
            for name, tensor in state.items():
                if tensor.shape != own[name].shape:
                    raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
                if tensor.dtype != own[name].dtype:
                    raise ValueError(f"{name} is of {tensor.dtype}, not {own[name].dtype}")
                own[name].copy_(tensor)
    except ValueError as problem:
        raise LoftError(f"{where} does not fit its description ({problem}): restore it or make it anew") from None
    return network.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def reestimate_statistics(network: nn.Module, data: DataSet, settings: Evaluation, world: World) -> None:
    """Set every normalisation's running mean and variance to their averages over a fixed list of training batches. Collective.

    Batch b of `settings.statistics_batches` is seen by rank b % size; the ranks' sums meet in one all-reduce, so all ranks get
    the same statistics. Each batch is normalised by its own statistics on the way, as in training. Raises LoftError, on all ranks, where
    they are not finite: numbers that are may overflow on their way through the network.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    tracked = [(norm, norm.momentum, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.track_running_stats = True
    network.train()
    seen = 0
    for images, _ in world.paced(data.calibration_batches(settings.statistics_batches, settings.statistics_batch, world.rank, world.size)):
        seen += 1
        for norm in norms:
            norm.momentum = 1 / seen  # the plain average over the batches; None means it too, but asks the device for their number
        network(images)
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    sums = torch.cat([tensor * seen for tensor in statistics] + [torch.full((1,), float(seen), device=statistics[0].device)])
    world.all_reduce_(sums, "control")()
    averages = sums[:-1] / sums[-1]
    if not averages.isfinite().all():
        raise _not_finite("normalisation statistics are")
    for tensor, average in zip(statistics, averages.split([len(tensor) for tensor in statistics]), strict=True):
        tensor.copy_(average)
    for norm, momentum, tracking in tracked:
        norm.momentum, norm.track_running_stats = momentum, tracking
    network.eval()


@torch.no_grad()
def score(network: nn.Module, data: DataSet, settings: Evaluation, world: World) -> Score:
    """Accuracy and loss over all test images, each seen by one rank. Collective. Raises LoftError, on all ranks, where the loss is not finite."""
    device = next(network.parameters()).device
    network.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in world.paced(data.test_batches(settings.evaluation_batch, world.rank, world.size)):
        output = network(images)
        loss = F.cross_entropy(output, labels, reduction="sum")
        sums[0] += (output.argmax(1) == labels).sum()
        sums[1] += len(labels)
        sums[2] += loss.double()
    world.all_reduce_(sums, "control")()
    correct, images, loss = sums.tolist()
    if not math.isfinite(loss):
        raise _not_finite("loss over the test images is")
    return Score(int(correct), int(images), loss / images)


def _not_finite(what: str) -> LoftError:
    return LoftError(
        f"the network's {what} not finite, so its accuracy would mean nothing: its weights are too large, train with a lower --lr",
        everywhere=True,
    )


def judge(network: nn.Module, data: DataSet, settings: Evaluation, world: World) -> Score:
    """Re-estimate the statistics, then score."""
    reestimate_statistics(network, data, settings, world)
    return score(network, data, settings, world)
