"""Bytes behind tensors, and bytes that autograd keeps of a forward pass: counted on tensors without contents."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loft_hpc.training.trainer import stop_statistics


def storage_bytes(tensors: Iterable[Tensor], but_not: Iterable[Tensor] = ()) -> int:
    """The memory that these tensors lie in, each piece of it counted once, without the pieces that any of `but_not` lies in."""
    return _bytes(_storages(tensors), but_not)


def kept_bytes(forward: Callable[[], Iterable[Tensor]], but_not: Iterable[Tensor] = ()) -> int:
    """What stays in memory after `forward()` until the backward pass: all that autograd saves, and the tensors returned.

    Without the memory of `but_not`: parameters, and inputs that are counted elsewhere.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        results = list(forward())
    return _bytes(saved | _storages(results), but_not)


@dataclass(frozen=True)
class Activations:
    """What one forward pass in training leaves behind for its backward pass, in bytes."""

    network: int
    """Kept of the network's own operations."""
    result: int
    """Its output, and what the loss keeps of it."""


def activations(
    build: Callable[[], nn.Module], image: tuple[int, int, int], images: int, begins: bool, ends: bool, autocast: bool
) -> Activations:
    """For a network, or a part of one, whose input is `images` tensors of shape `image` (C, H, W).

    `begins`: the input needs no gradient; `ends`: a cross-entropy follows. The input is not counted. With `autocast`, convolutions are in
    bfloat16 and so are the copies of their weights, which autograd keeps too: the CPU's autocast is asked, which lowers the same ones of our
    operations as a GPU's and is there without a GPU. Temporaries of the backward pass and of kernels are not counted.
    """
    with FakeTensorMode():
        network = build().train()
        stop_statistics(network)
        x = torch.empty(images, *image).requires_grad_(not begins)
        own = [*network.parameters(), x]

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return network(x).float()

        whole = kept_bytes(lambda: [forward()], own)
        output = forward().detach().requires_grad_()
        labels = torch.zeros(images, dtype=torch.int64)
        result = kept_bytes(lambda: [output, F.cross_entropy(output, labels, reduction="sum")] if ends else [output], [labels])
        return Activations(whole - storage_bytes([output]), result)


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """By what tells two pieces of memory apart, with or without contents."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _bytes(storages: dict[int, torch.UntypedStorage], but_not: Iterable[Tensor]) -> int:
    known = _storages(but_not)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)
