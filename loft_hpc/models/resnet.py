"""The one network class: full networks, LoFT's sub-networks and pruned networks differ in their hidden widths alone."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loft_hpc.models.architecture import Architecture, BlockShape

CLASSIFIER = "fc."
"""Prefix of the classifier's parameters."""


class Shortcut(nn.Conv2d):
    """A strided 1x1 convolution without padding.

    With fewer than 8 input channels, channels last, oneDNN's weight gradient of one is wrong, hangs or corrupts the heap on processors with
    AVX2 alone (oneDNN issue 6035): there the pixels are picked first, which is the same function.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 8 or x.is_cuda:
            return super().forward(x)
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last), self.weight)


class BasicBlock(nn.Module):
    """conv1 -> bn1 -> relu -> conv2 -> bn2, added to the shortcut, then relu (He et al., 1512.03385, figure 2).

    conv1's output channels are the block's hidden filters: conv1.weight is (hidden, in, 3, 3), conv2.weight (out, hidden, 3, 3).
    """

    def __init__(self, shape: BlockShape, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(shape.in_channels, hidden, 3, shape.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, shape.out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(shape.out_channels)
        self.downsample = None
        if shape.changes_shape:
            self.downsample = nn.Sequential(
                Shortcut(shape.in_channels, shape.out_channels, 1, shape.stride, bias=False),
                nn.BatchNorm2d(shape.out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PreActivationBlock(nn.Module):
    """bn1 -> relu -> conv1 -> bn2 -> relu -> conv2, added to the shortcut (He et al., 1603.05027).

    The 1x1 shortcut of a block that changes shape starts from the activated input and has no normalisation of its own.
    """

    def __init__(self, shape: BlockShape, hidden: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(shape.in_channels)
        self.conv1 = nn.Conv2d(shape.in_channels, hidden, 3, shape.stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, shape.out_channels, 3, padding=1, bias=False)
        self.downsample = None
        if shape.changes_shape:
            self.downsample = Shortcut(shape.in_channels, shape.out_channels, 1, shape.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        out += shortcut
        return out


class ResidualNetwork(nn.Module):
    """Stem, stages of residual blocks, global average pool, linear classifier; parameter names follow torchvision.

    Input (N, in_channels, H, W), output (N, num_classes).
    """

    def __init__(self, architecture: Architecture, hidden_widths: Mapping[str, int]):
        super().__init__()
        width = architecture.widths[0]
        imagenet = architecture.stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(architecture.in_channels, width, 7, 2, padding=3, bias=False)
            if imagenet
            else nn.Conv2d(architecture.in_channels, width, 3, padding=1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        # A pre-activation block starts with its own ReLU, so only the pool of the ImageNet stem needs one before it.
        self.relu = nn.ReLU(inplace=True) if imagenet or not architecture.pre_activation else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        block = PreActivationBlock if architecture.pre_activation else BasicBlock
        stages: dict[int, list[nn.Module]] = {}
        for shape in architecture.block_shapes():
            stages.setdefault(shape.stage, []).append(block(shape, hidden_widths[shape.name]))
        self.stage_names = [f"layer{stage}" for stage in stages]
        for name, blocks in zip(self.stage_names, stages.values(), strict=True):
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(architecture.widths[-1], architecture.num_classes)

    def sections(self) -> list[nn.Sequential]:
        """The network as a row of modules to be run one after the other: stem, every residual block, head. Parameters are shared."""
        blocks = [nn.Sequential(block) for name in self.stage_names for block in self.get_submodule(name)]
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, *blocks, nn.Sequential(self.avgpool, nn.Flatten(1), self.fc)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def new_classifier(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Parameters of a classifier for this network, drawn as torch draws a linear layer's, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(architecture.widths[-1], architecture.num_classes)
    return {f"{CLASSIFIER}{name}": parameter.detach() for name, parameter in layer.named_parameters()}


def build(architecture: Architecture, hidden_widths: Mapping[str, int] | None = None, seed: int | None = None) -> ResidualNetwork:
    """A network with these hidden filters per block (by default all that the architecture has).

    With `seed` the parameters are drawn as torchvision draws a ResNet's (Kaiming normal over fan-out, normalisations at 1 and
    0), the same on every machine and without touching the global generator; without it they are left for the caller to fill.
    """
    widths = architecture.hidden_widths() | dict(hidden_widths or {})
    if seed is None:
        with torch.device("meta"):
            network = ResidualNetwork(architecture, widths)
        # as Module.to_empty does, for which torch loads all that it needs to trace programs
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in network.state_dict().items()}
        network.load_state_dict(empty, assign=True)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResidualNetwork(architecture, widths)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
