"""Filter groups: the one table from which partition, slice, merge, pruning, ranking and byte counts follow.

Legend: a *state* maps names to tensors, as `state_dict` gives it; a *selection* maps a group's name to the sorted indices of
the filters meant, as a (k,) int64 tensor; a *holding* is a state together with the selection whose filters it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture

State = Mapping[str, Tensor]
Selection = Mapping[str, Tensor]

PARTITION_RULES = ("paper", "all-blocks")
_STATISTICS = ("running_mean", "running_var")


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

    @property
    def filters(self) -> str:
        """Name of the weight whose dimension 0 are the filters themselves, (width, C_in, 3, 3): what rankings look at."""
        return f"{self.name}.conv1.weight"


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


def partitioned_groups(groups: Sequence[FilterGroup], rule: str) -> tuple[FilterGroup, ...]:
    """The groups that LoFT deals to its workers.

    `paper`: as in the poster and its release, all but stage 1 and the strided first block of the later stages.
    `all-blocks`: every group.
    """
    if rule == "all-blocks":
        return tuple(groups)
    if rule == "paper":
        return tuple(group for group in groups if group.stage > 1 and not group.changes_shape)
    raise LoftError(f"unknown partition rule '{rule}': choose one of {', '.join(PARTITION_RULES)}")


def everything(groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
    """The selection of all filters."""
    return {group.name: torch.arange(group.width) for group in groups}


def member_names(groups: Sequence[FilterGroup]) -> set[str]:
    """Names of all entries that are indexed by the filters of these groups."""
    return {name for group in groups for name, _ in group.members}


def collect(target: State, wanted: Selection, holdings: Sequence[Holding], groups: Sequence[FilterGroup]) -> None:
    """Fill the grouped entries of `target` with the `wanted` filters, each taken from the holding that has it.

    Every wanted filter must be in exactly one holding. Entries of a group that `target` lacks are passed over, so states of
    parameters alone and states with running statistics serve alike. Works in place; no other entry is touched.
    """
    for group in groups:
        owner = torch.empty(group.width, dtype=torch.int64)
        position = torch.empty(group.width, dtype=torch.int64)
        for number, holding in enumerate(holdings):
            held = holding.selection[group.name]
            owner[held] = number
            position[held] = torch.arange(len(held))
        want = wanted[group.name]
        for number, holding in enumerate(holdings):
            destination = (owner[want] == number).nonzero().flatten()
            if not len(destination):
                continue
            source = position[want[destination]]
            for name, dimension in group.members:
                if name in target:
                    _copy_filters(target[name], destination, holding.state[name], source, dimension)


def _copy_filters(target: Tensor, to: Tensor, source: Tensor, at: Tensor, dimension: int) -> None:
    """target[..., to, ...] = source[..., at, ...] along `dimension`."""
    to, at = to.to(target.device), at.to(source.device)
    if dimension == 0:
        target[to] = source[at]
    else:
        target[:, to] = source[:, at]


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
