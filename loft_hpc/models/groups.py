"""Filter groups: the one table from which partition, slice, merge, pruning, ranking and byte counts follow.

Legend: a *state* maps names to tensors, as `state_dict` gives it; a *selection* maps a group's name to the sorted indices of
the filters meant, as a (k,) int64 tensor; a *holding* is a state together with the selection whose filters it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture

State = Mapping[str, Tensor]
Selection = Mapping[str, Tensor]

PARTITION_RULES = ("paper", "all-blocks")
_STATISTICS = ("running_mean", "running_var")
_CACHED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class FilterGroup:
    """The hidden filters of one residual block, and every tensor that is indexed by them."""

    name: str
    """The block's name, for instance `layer2.1`."""
    stage: int
    width: int
    """Hidden filters in the full network."""
    members: tuple[tuple[str, int], ...]
    """(name in the state, dimension that counts hidden filters): conv1.weight 0, the hidden normalisation 0, conv2.weight 1."""
    changes_shape: bool
    """Whether the block is strided or widens."""
    unit: int = 1
    """Workers hold multiples of so many of its filters."""

    def shares(self, workers: int) -> list[int]:
        """How many of its filters each worker holds, the same in every round: see `shares`."""
        return shares(self.width, workers, self.unit)

    @property
    def filters(self) -> str:
        """Name of the weight whose dimension 0 are the filters themselves, (width, C_in, 3, 3): what rankings look at."""
        return f"{self.name}.conv1.weight"

    @property
    def scale(self) -> str:
        """Name of the (width,) weight by which normalisation scales the hidden filters."""
        return next(name for name, dimension in self.members if name.endswith(".weight") and name != self.filters and dimension == 0)


class Holding(NamedTuple):
    """A state that holds only the filters of `selection` (all other entries of the state are whole)."""

    state: State
    selection: Selection


def filter_groups(architecture: Architecture) -> tuple[FilterGroup, ...]:
    """The filter group of every residual block, in forward order."""
    hidden_norm = "bn2" if architecture.pre_activation else "bn1"
    widths = architecture.hidden_widths()
    return tuple(
        FilterGroup(
            name=block.name,
            stage=block.stage,
            width=widths[block.name],
            members=(
                (f"{block.name}.conv1.weight", 0),
                *((f"{block.name}.{hidden_norm}.{entry}", 0) for entry in ("weight", "bias", *_STATISTICS)),
                (f"{block.name}.conv2.weight", 1),
            ),
            changes_shape=block.changes_shape,
        )
        for block in architecture.block_shapes()
    )


def partitioned_groups(groups: Sequence[FilterGroup], rule: str, unit: int = 1) -> tuple[FilterGroup, ...]:
    """The groups that LoFT deals to its workers.

    `paper`: as in the poster and its release, all but stage 1 and the strided first block of the later stages.
    `all-blocks`: every group. Workers hold multiples of `unit` filters where the width allows it.
    """
    if rule == "all-blocks":
        return tuple(replace(group, unit=unit) for group in groups)
    if rule == "paper":
        return tuple(replace(group, unit=unit) for group in groups if group.stage > 1 and not group.changes_shape)
    raise LoftError(f"unknown partition rule '{rule}': choose one of {', '.join(PARTITION_RULES)}")


def shares(width: int, workers: int, unit: int = 1) -> list[int]:
    """How many of `width` filters each worker holds, in units: equal, the first workers one unit more where they do not divide.

    A unit of 1 serves where `unit` does not divide the width, or where there are fewer units than workers.
    """
    if width % unit or width // unit < workers:
        unit = 1
    units = width // unit
    return [unit * (units // workers + (worker < units % workers)) for worker in range(workers)]


def everything(groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
    """The selection of all filters."""
    return {group.name: torch.arange(group.width) for group in groups}


def member_names(groups: Sequence[FilterGroup]) -> set[str]:
    """Names of all entries that are indexed by the filters of these groups."""
    return {name for group in groups for name, _ in group.members}


def parameters_of(state: State) -> dict[str, Tensor]:
    """A state without normalisation statistics."""
    return {name: tensor for name, tensor in state.items() if not name.endswith((*_STATISTICS, "num_batches_tracked"))}


def collect(target: State, wanted: Selection, holdings: Sequence[Holding], groups: Sequence[FilterGroup]) -> None:
    """Fill the grouped entries of `target` with the `wanted` filters, each taken from the holding that has it.

    Every wanted filter must be in exactly one holding. Entries of a group that `target` lacks are passed over, so states of
    parameters alone and states with running statistics serve alike. Works in place; no other entry is touched.
    """
    for group in groups:
        held = [holding.selection[group.name] for holding in holdings]
        # Where each filter stands when the holdings' filters are laid one after the other.
        place = torch.empty(group.width, dtype=torch.int64)
        together = torch.cat(held)
        place[together] = torch.arange(len(together))
        pick = place[wanted[group.name]]
        for name, dimension in group.members:
            if name in target:
                sources = [holding.state[name] for holding in holdings]
                if dimension == 1 and not target[name].is_cuda:
                    _take_columns(target[name], sources, pick)
                else:
                    _take(target[name], sources, pick, dimension)


def _take(target: Tensor, sources: Sequence[Tensor], pick: Tensor, dimension: int) -> None:
    """target = cat(sources, dimension).index_select(dimension, pick), without the concatenation."""
    if dimension == 0 and target.dim() == 4 and all(_channels_last(tensor) for tensor in (target, *sources)):
        # filters lie one after the other in memory: rows of a matrix, which torch copies whole
        target, *sources = (tensor.permute(0, 2, 3, 1).view(len(tensor), tensor.shape[1:].numel()) for tensor in (target, *sources))
    if len(sources) == 1 and not target.is_cuda:
        torch.index_select(sources[0], dimension, pick, out=target)
        return
    start = 0
    for source in sources:
        here = (pick >= start) & (pick < start + source.shape[dimension])
        destination, index = (tensor.to(source.device) for tensor in (here.nonzero().flatten(), pick[here] - start))
        target.index_copy_(dimension, destination, source.index_select(dimension, index))
        start += source.shape[dimension]


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _take_columns(target: Tensor, sources: Sequence[Tensor], pick: Tensor) -> None:
    """The same along the input channels of (O, I, H, W) weights on a CPU.

    Channels last, those are single numbers side by side, which numpy's `take` picks faster than torch's indexing does; done for a
    few output channels at a time, so that the concatenation stays in the cache (bin/bench exchange shows it as `unpack`).
    """
    parts = [source.permute(0, 2, 3, 1).numpy() for source in sources if source.numel()]
    result, index = target.permute(0, 2, 3, 1).numpy(), pick.numpy()
    channels, height, width, wanted = result.shape
    if not wanted:
        return
    inputs = sum(part.shape[3] for part in parts)
    rows = max(1, _CACHED_ELEMENTS // (height * width * inputs))
    together = np.empty((rows, height, width, inputs), dtype=result.dtype) if len(parts) > 1 else None
    for first in range(0, channels, rows):
        block = slice(first, min(first + rows, channels))
        pieces = [part[block] for part in parts]
        piece = np.concatenate(pieces, axis=3, out=together[: block.stop - first]) if len(pieces) > 1 else pieces[0]
        # mode="clip" spares a buffer and a check; the indices are in range by construction
        np.take(piece, index, axis=3, out=result[block], mode="clip")


def slice_state(state: State, selection: Selection, groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
    """The sub-network's state: of every group only the selected filters; all other entries shared with `state`, not copied."""
    members = member_names(groups)
    part = {name: tensor for name, tensor in state.items() if name not in members}
    for group in groups:
        kept = selection[group.name]
        for name, dimension in group.members:
            if name in state:
                part[name] = state[name].index_select(dimension, kept.to(state[name].device))
    return {name: part[name] for name in state}


def merge_states(holdings: Sequence[Holding], groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
    """The full state out of sub-networks that together hold every filter once: `slice_state`'s exact inverse.

    Entries outside the groups are taken from the first holding.
    """
    first = holdings[0].state
    dimensions = {name: (dimension, group.width) for group in groups for name, dimension in group.members}
    merged = {}
    for name, tensor in first.items():
        if name in dimensions:
            dimension, width = dimensions[name]
            shape = list(tensor.shape)
            shape[dimension] = width
            merged[name] = tensor.new_empty(shape)
        else:
            merged[name] = tensor
    collect(merged, everything(groups), holdings, groups)
    return merged


def mask_state(state: State, selection: Selection, groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
    """The full network with every filter outside `selection` silenced: its weights and its normalisation's weight and bias are 0.

    A silenced filter's activation is exactly 0, so the output is that of the sliced network up to the order of summation.
    """
    masked = dict(state)
    for group in groups:
        for name, dimension in group.members:
            if name not in state or name.endswith(_STATISTICS):
                continue
            keep = torch.zeros(group.width, dtype=torch.bool)
            keep[selection[group.name]] = True
            shape = [1] * state[name].dim()
            shape[dimension] = group.width
            masked[name] = torch.where(keep.view(shape).to(state[name].device), state[name], 0)
    return masked
