"""What a ticket keeps of a network: hidden filters, whole residual blocks, or single weights.

A mask of filters or blocks makes a physically smaller network; a mask of weights leaves the network's shape and holds weights at zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import FilterGroup, Selection, State, everything, filter_groups, slice_state
from loft_hpc.models.resnet import ResidualNetwork

Scores = Mapping[str, Tensor]
"""What units were ranked by, larger being better, laid out as `Mask.tensors`."""


@dataclass(frozen=True)
class Removed:
    """How much a mask removes, in its own units."""

    units: int
    of: int
    """Units that may go: the filters of prunable blocks, the blocks that keep their shape, the weights of convolutions and classifier."""

    @property
    def share(self) -> float:
        """The pruning ratio that this comes to."""
        return self.units / self.of


class Mask(ABC):
    """Which units of the network `dense` stay. `tensors` name 0/1 vectors or tensors over its units, one for each layer of them."""

    kind: ClassVar[str]
    """`filter`, `layer` or `weight`."""

    def __init__(self, dense: Architecture):
        self.dense = dense

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """Of the network that the ticket is."""

    @property
    @abstractmethod
    def hidden_widths(self) -> dict[str, int]:
        """Hidden filters of its blocks."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """uint8, 1 for a unit that stays: layers of units by name."""

    @abstractmethod
    def carve(self, state: State) -> dict[str, Tensor]:
        """The ticket's part of a state of the dense network, with or without statistics. Raises LoftError for another network's."""

    @property
    def weights(self) -> dict[str, Tensor] | None:
        """0/1 over the weights that training must hold at zero, by name; None where the network is smaller instead."""
        return None

    @abstractmethod
    def removed(self, groups: Sequence[FilterGroup]) -> Removed:
        """How many units are gone; `groups`: those whose filters might have gone."""

    def emptied(self) -> list[str]:
        """Layers that keep none of their weights."""
        return []

    @classmethod
    @abstractmethod
    def of(cls, dense: Architecture, tensors: Mapping[str, Tensor]) -> "Mask":
        """The inverse of `tensors`. Raises ValueError, saying what is wrong, where they are no mask of this network."""

    # -- the same number of units in every layer, others -------------------------------------------------------------------

    def shuffled(self, seed: int) -> "Mask":
        """As many units of every layer, drawn uniformly: what a mask is worth beyond its numbers (Frankle et al. 2021, 2009.08576)."""
        draw = np.random.default_rng(seeds.derive(seed, "ticket", 2))  # not the draw of a random ticket with this seed

        def shuffle(mask: np.ndarray) -> np.ndarray:
            return draw.permutation(mask)

        return self._with(shuffle)

    def inverted(self, scores: Scores) -> "Mask":
        """As many units of every layer, those with the lowest scores; of equal scores the ones that stand last."""
        ranked = {name: scores[name].double().flatten().numpy() for name in self._free()}

        def lowest(mask: np.ndarray, name: str) -> np.ndarray:
            turned = np.zeros_like(mask)
            turned[np.argsort(ranked[name][::-1], kind="stable")[: int(mask.sum())]] = 1
            return turned[::-1]

        return self._with(lowest, named=True)

    def _free(self) -> dict[str, Tensor]:
        """The parts of `tensors` in which units may change places."""
        return self.tensors()

    def _with(self, change, named: bool = False) -> "Mask":
        made = dict(self.tensors())
        for name, mask in self._free().items():
            flat = mask.flatten().numpy()
            new = change(flat, name) if named else change(flat)
            made[name] = torch.from_numpy(np.ascontiguousarray(new)).view(mask.shape)
        return type(self).of(self.dense, made)


def check_binary(mask: Tensor | None, shape: Sequence[int], what: str) -> Tensor:
    """The mask itself. Raises ValueError unless it is a uint8 tensor of 0 and 1, of this shape."""
    if mask is None or mask.dtype != torch.uint8 or tuple(mask.shape) != tuple(shape) or (mask.numel() and mask.max() > 1):
        raise ValueError(f"no mask of 0 and 1 over {what}")
    return mask


class FilterMask(Mask):
    """Hidden filters of the residual blocks, by block: (filters,) each."""

    kind = "filter"

    def __init__(self, dense: Architecture, selection: Selection):
        """`selection`: the filters that stay; blocks that it does not name keep all."""
        super().__init__(dense)
        self._groups: tuple[FilterGroup, ...] = filter_groups(dense)
        self.selection = everything(self._groups) | dict(selection)

    @property
    def architecture(self) -> Architecture:
        return self.dense

    @property
    def hidden_widths(self) -> dict[str, int]:
        return {name: len(kept) for name, kept in self.selection.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {
            group.name: torch.zeros(group.width, dtype=torch.uint8).index_fill(0, self.selection[group.name], 1) for group in self._groups
        }

    def removed(self, groups: Sequence[FilterGroup]) -> Removed:
        widths = sum(group.width for group in groups)
        return Removed(widths - sum(len(self.selection[group.name]) for group in groups), widths)

    def carve(self, state: State) -> dict[str, Tensor]:
        refuse_strange(state, self.dense)
        return slice_state(state, self.selection, self._groups)

    @classmethod
    def of(cls, dense: Architecture, tensors: Mapping[str, Tensor]) -> "FilterMask":
        selection = {}
        for group in filter_groups(dense):
            what = f"the {group.width} filters of {group.name}"
            mask = check_binary(tensors.get(group.name), (group.width,), what)
            if not mask.any():
                raise ValueError(f"no mask of 0 and 1 over {what} that keeps any")
            selection[group.name] = mask.nonzero().flatten()
        return cls(dense, selection)


class BlockMask(Mask):
    """Whole residual blocks: one vector `blocks` over them, in forward order.

    What is left is numbered anew, stage by stage: without `layer2.1`, the old `layer2.2` is `layer2.1` of the shallower network. Blocks that
    change shape stay, and so does at least one block of every stage.
    """

    kind = "layer"

    def __init__(self, dense: Architecture, kept: Sequence[str]):
        super().__init__(dense)
        shapes = list(dense.block_shapes())
        self._names = [shape.name for shape in shapes]
        self.kept = [name for name in self._names if name in set(kept)]
        gone = [shape.name for shape in shapes if shape.changes_shape and shape.name not in self.kept]
        if gone:
            raise ValueError(f"a mask that removes {gone[0]}, which changes shape and must stay")
        counts = [sum(shape.stage == stage and shape.name in self.kept for shape in shapes) for stage in range(1, len(dense.blocks) + 1)]
        if min(counts) < 1:
            raise ValueError(f"a mask that leaves stage {1 + counts.index(0)} without a block")
        self._architecture = replace(dense, blocks=tuple(counts))
        new = [shape.name for shape in self._architecture.block_shapes()]
        self._renamed = dict(zip(self.kept, new, strict=True))

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @property
    def hidden_widths(self) -> dict[str, int]:
        return self._architecture.hidden_widths()

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": torch.tensor([name in self.kept for name in self._names], dtype=torch.uint8)}

    def removed(self, groups: Sequence[FilterGroup]) -> Removed:
        return Removed(len(self._names) - len(self.kept), sum(not shape.changes_shape for shape in self.dense.block_shapes()))

    def carve(self, state: State) -> dict[str, Tensor]:
        refuse_strange(state, self.dense)
        carved = {}
        for name, tensor in state.items():
            block = ".".join(name.split(".")[:2])
            if block not in self._names:
                carved[name] = tensor
            elif block in self._renamed:
                carved[self._renamed[block] + name.removeprefix(block)] = tensor
        return carved

    def shuffled(self, seed: int) -> "BlockMask":
        """As many blocks, drawn uniformly of those that may go."""
        draw = np.random.default_rng(seeds.derive(seed, "ticket", 2))  # not the draw of a random ticket with this seed
        order = list(self._names)
        return self._removing([order[index] for index in draw.permutation(len(order))])

    def inverted(self, scores: Scores) -> "BlockMask":
        """As many blocks, the highest-scored ones being removed."""
        return self._removing([self._names[index] for index in np.argsort(-scores["blocks"].double().numpy(), kind="stable")])

    def _removing(self, order: Sequence[str]) -> "BlockMask":
        """Without as many blocks as this mask removes: the first of `order` that may go."""
        left, wanted = list(self._names), len(self._names) - len(self.kept)
        for name in order:
            if len(self._names) - len(left) == wanted:
                break
            try:
                left = BlockMask(self.dense, [other for other in left if other != name]).kept
            except ValueError:
                continue
        return BlockMask(self.dense, left)

    @classmethod
    def of(cls, dense: Architecture, tensors: Mapping[str, Tensor]) -> "BlockMask":
        names = [shape.name for shape in dense.block_shapes()]
        mask = check_binary(tensors.get("blocks"), (len(names),), f"the {len(names)} residual blocks")
        return cls(dense, [name for name, stays in zip(names, mask.tolist(), strict=True) if stays])


class WeightMask(Mask):
    """Single weights of all convolutions and of the classifier, each a tensor of the weight's shape."""

    kind = "weight"

    def __init__(self, dense: Architecture, kept: Mapping[str, Tensor]):
        super().__init__(dense)
        self.kept = dict(kept)

    @property
    def architecture(self) -> Architecture:
        return self.dense

    @property
    def hidden_widths(self) -> dict[str, int]:
        return self.dense.hidden_widths()

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.kept

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def carve(self, state: State) -> dict[str, Tensor]:
        refuse_strange(state, self.dense)
        return {name: torch.where(self.kept[name].bool(), tensor, 0) if name in self.kept else tensor for name, tensor in state.items()}

    @property
    def count(self) -> int:
        """Weights that stay."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def total(self) -> int:
        return sum(mask.numel() for mask in self.kept.values())

    def removed(self, groups: Sequence[FilterGroup]) -> Removed:
        return Removed(self.total - self.count, self.total)

    def emptied(self) -> list[str]:
        return [name for name, mask in self.kept.items() if not mask.any()]

    @classmethod
    def of(cls, dense: Architecture, tensors: Mapping[str, Tensor]) -> "WeightMask":
        shapes = weight_shapes(dense)
        return cls(dense, {name: check_binary(tensors.get(name), shape, f"the weights of {name}") for name, shape in shapes.items()})


def weight_shapes(dense: Architecture) -> dict[str, torch.Size]:
    """The weights that a mask of weights covers, with their shapes, in forward order: those of convolutions and of the classifier."""
    with torch.device("meta"):
        network = ResidualNetwork(dense, dense.hidden_widths())
    return {name: parameter.shape for name, parameter in network.named_parameters() if parameter.dim() > 1}


def refuse_strange(state: State, dense: Architecture) -> None:
    """Raises LoftError unless this is a state of the dense network: a ticket may have come into another one's run."""
    with torch.device("meta"):
        expected = dict(ResidualNetwork(dense, dense.hidden_widths()).named_parameters())
    wrong = [name for name, tensor in expected.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise LoftError(
            f"the state to take the ticket's weights from has another {wrong[0]}: it belongs to another network than the ticket"
        )


MASKS: dict[str, type[Mask]] = {mask.kind: mask for mask in (FilterMask, BlockMask, WeightMask)}
