"""Parameters laid end to end in one flat tensor, so that they are stepped, averaged and sent as one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_ALIGNED = 4
"""Elements of float32 in 16 bytes: kernels load as many at once where a tensor begins at a multiple of it."""


class Layout:
    """Where each named tensor lies in a flat buffer, convolution weights channels last.

    Ranks that know each other's shapes know each other's layouts, so a buffer travels without any description. Tensors that fill whole units
    of 16 bytes come first, so that they are aligned without padding, which would travel too: a network's convolutions, as long as either
    side's width is a multiple of 4. The others follow (normalisations of odd widths, the classifier's bias).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = dict(sorted(shapes.items(), key=lambda named: torch.Size(named[1]).numel() % _ALIGNED != 0))
        """In the order in which they lie."""
        self.offsets: dict[str, int] = {}
        """Where each tensor begins."""
        self.numel = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.numel
            self.numel += torch.Size(shape).numel()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors inside a flat (numel,) tensor; writing to one writes to the buffer."""
        views = {}
        for name, shape in self.shapes.items():
            offset = self.offsets[name]
            piece = flat[offset : offset + torch.Size(shape).numel()]
            if len(shape) == 4:
                out, inner, height, width = shape
                views[name] = piece.view(out, height, width, inner).permute(0, 3, 1, 2)
            else:
                views[name] = piece.view(shape)
        return views


class ParameterBuffer:
    """A network's parameters, re-pointed into one flat buffer together with their momentum and gradient.

    `content` is [values | momentum] where the momentum travels with the parameters, else the values alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], momentum_travels: bool = False):
        self.layout = Layout({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        device = next(iter(parameters.values())).device if parameters else None
        size = self.layout.numel
        self.content = torch.zeros(2 * size if momentum_travels else size, device=device)
        self.values = self.content[:size]
        self.momentum = self.content[size:] if momentum_travels else torch.zeros(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self.views = self.layout.views(self.values)
        gradients = self.layout.views(self.gradient)
        for name, parameter in parameters.items():
            with torch.no_grad():
                self.views[name].copy_(parameter)
            parameter.data = self.views[name]
            parameter.grad = gradients[name]
