"""Memory that a network takes in inference and in training: counted to the byte on tensors without contents."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loft_hpc.analysis.memory import activations, storage_bytes
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import ResidualNetwork


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network in float32 for a batch of `images`.

    Not counted: the batch itself, a kernel's scratch memory, temporaries of the backward pass, and what an allocator rounds up.
    """

    images: int
    parameters_bytes: int
    """Trainable parameters, normalisations' scales and shifts included."""
    statistics_bytes: int
    """Running means, variances and batch counters of the normalisations."""
    inference_activations_bytes: int
    """The most that lives at one moment of a forward pass in evaluation mode, run operation by operation as here: outputs in being, and
    what waits to be added at the end of a block. It does not grow with depth."""
    training_activations_bytes: int | None
    """All that is kept of a forward pass for the backward pass, and the output with what cross-entropy keeps (`analysis.memory`); None
    for a single image, which has no variance to normalise by and is not trained on."""

    @property
    def inference_peak_bytes(self) -> int:
        return self.parameters_bytes + self.statistics_bytes + self.inference_activations_bytes

    @property
    def training_bytes(self) -> int | None:
        """Parameters, as many gradients and momenta, statistics, and activations kept for the backward pass: when that begins."""
        if self.training_activations_bytes is None:
            return None
        return 3 * self.parameters_bytes + self.statistics_bytes + self.training_activations_bytes


def footprint(architecture: Architecture, hidden_widths: Mapping[str, int] | None, image_size: int, images: int) -> Footprint:
    """For a batch of images of (in_channels, image_size, image_size); a ticket's hidden widths, or None for the dense network."""
    widths = architecture.hidden_widths() | dict(hidden_widths or {})
    return footprint_of(lambda: ResidualNetwork(architecture, widths), (architecture.in_channels, image_size, image_size), images)


def footprint_of(build: Callable[[], nn.Module], image: tuple[int, int, int], images: int) -> Footprint:
    """For the network that `build` makes, whose input is `images` tensors of shape `image` (C, H, W)."""
    with FakeTensorMode():
        network = build().eval()
        x = torch.empty(images, *image)
        alive = peak_bytes(lambda: network(x), [*network.parameters(), *network.buffers(), x])
        parameters, statistics = storage_bytes(network.parameters()), storage_bytes(network.buffers())
    if images < 2:
        return Footprint(images, parameters, statistics, alive, None)
    kept = activations(build, image, images, begins=True, ends=True, autocast=False)
    return Footprint(images, parameters, statistics, alive, kept.network + kept.result)


def peak_bytes(forward: Callable[[], Any], but_not: Iterable[Tensor] = ()) -> int:
    """The most bytes of tensors that live at one time while `forward()` runs without gradients, the memory of `but_not` left out."""
    living = _Living(but_not)
    with torch.no_grad(), living:
        forward()
    return living.peak


class _Living(TorchDispatchMode):
    """Looks after every operation at the memory that is still held: what the operation read is, and what it wrote."""

    def __init__(self, but_not: Iterable[Tensor]):
        super().__init__()
        self.peak = 0
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in but_not}
        self._bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._bytes[StorageWeakRef(storage)] = storage.nbytes()
        self._bytes = {held: size for held, size in self._bytes.items() if held not in self._known and not held.expired()}
        self.peak = max(self.peak, sum(self._bytes.values()))
        return results
