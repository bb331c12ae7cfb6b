"""How large a network is: parameters and floating-point operations."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import ResidualNetwork

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Size:
    parameters: int
    """Trainable parameters, normalisations included."""
    """With a mask of weights, those that stay."""
    flops: int
    """Per image in a forward pass: convolutions and the classifier, a multiply-add counting 2. With a mask of weights, those of weights
    that stay: what hardware that skips zeros would do, which dense kernels do not (latencies show it)."""


def network_size(architecture: Architecture, hidden_widths: Mapping[str, int] | None, image_size: int) -> Size:
    """Parameters and FLOPs for images of (in_channels, image_size, image_size), without computing anything (torch's meta device)."""
    with torch.device("meta"):
        network = ResidualNetwork(architecture, architecture.hidden_widths() | dict(hidden_widths or {})).eval()
        image = torch.empty(1, architecture.in_channels, image_size, image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
    return Size(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops())


def ticket_size(
    architecture: Architecture, hidden_widths: Mapping[str, int] | None, kept: Mapping[str, Tensor] | None, image_size: int
) -> Size:
    """The same of a ticket: `kept` is 0/1 over the weights that a mask covers, by name; None where the network is smaller instead."""
    whole = network_size(architecture, hidden_widths, image_size)
    if kept is None:
        return whole
    places: dict[str, int] = {}
    with torch.device("meta"):
        network = ResidualNetwork(architecture, architecture.hidden_widths() | dict(hidden_widths or {})).eval()
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda module, inputs, output, name=name: places.update({name: output[0, 0].numel()}))
        with torch.no_grad():
            network(torch.empty(1, architecture.in_channels, image_size, image_size))
    alive = {name.removesuffix(".weight"): int(mask.sum()) for name, mask in kept.items()}
    removed = sum(mask.numel() for mask in kept.values()) - sum(alive.values())
    return Size(whole.parameters - removed, sum(FLOPS_PER_MULTIPLY_ADD * count * places[name] for name, count in alive.items()))


def section_flops(architecture: Architecture, image_size: int) -> list[int]:
    """FLOPs per image of the stem, of every residual block, and of the head, as in `network_size`: their sum."""
    with torch.device("meta"):
        network = ResidualNetwork(architecture, architecture.hidden_widths()).eval()
        x = torch.empty(1, architecture.in_channels, image_size, image_size)
        flops = []
        for section in network.sections():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                x = section(x)
            flops.append(counter.get_total_flops())
    return flops
