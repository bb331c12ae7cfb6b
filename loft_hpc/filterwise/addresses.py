"""Where every element of a rank's partitioned parameters lies in another buffer, computed on the device where the buffers are.

Legend: N elements of the rank's own partitioned parameters; a *line* is one filter's part of one tensor, a row of (filters, rest) or a
column of (rest, filters), and an element's *rest* its place in the line; copies: 2 where momentum lies behind the values, else 1.

    address of an element = start of its line + its rest * stride of its line

Which line and which rest is the same in every round: two tables, made once. Starts and strides follow from the deals: a few numbers for each
filter, the only thing that a round sends to the device, and nothing is asked of it. So the kernels of a round are as many for one group
as for a hundred.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loft_hpc.models.groups import FilterGroup, Selection
from loft_hpc.training.buffers import Layout

_INT32_ELEMENTS = 2**31


class Piece(NamedTuple):
    """A part of the other buffer: from element `start` on the filters of `hand`, laid out as `layout`, `copies` times."""

    start: int
    layout: Layout
    hand: Selection


class Addresses:
    """Of one rank, whose `layout` is the same for the whole run. The tables take 8 bytes for each of its N parameters."""

    def __init__(self, layout: Layout, groups: Sequence[FilterGroup], copies: int, device: torch.device):
        self._layout, self._copies, self._device = layout, copies, device
        # each tensor's group, the dimension that its filters are counted by, and its lines
        self._members: list[tuple[FilterGroup, str, int, slice]] = []
        lines, rests, end = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
        dimensions = {name: (group, dimension) for group in groups for name, dimension in group.members}
        for name, shape in layout.shapes.items():
            group, dimension = dimensions[name]
            filters = shape[dimension]
            rest = torch.Size(shape).numel() // filters
            line, place = np.arange(end, end + filters, dtype=np.int32), np.arange(rest, dtype=np.int32)
            # convolution weights lie channels last, so along dimension 1 filters are neighbours
            lines.append(np.tile(line, rest) if dimension else np.repeat(line, rest))
            rests.append(np.repeat(place, filters) if dimension else np.tile(place, filters))
            self._members.append((group, name, dimension, slice(end, end + filters)))
            end += filters
        self._count = end
        self._line, self._rest = (torch.from_numpy(np.concatenate(table)).to(device) for table in (lines, rests))

    @property
    def table_bytes(self) -> int:
        """What stays on the device from round to round."""
        return sum(table.numel() * table.element_size() for table in (self._line, self._rest))

    def gather(self, own: Tensor, hand: Selection, other: Tensor, pieces: Sequence[Piece]) -> None:
        """Fill `own` (copies * N,), which will hold the filters of `hand`, from the flat `other` with these pieces."""
        torch.index_select(other, 0, self._of(hand, pieces, other.numel()), out=own)

    def scatter(self, own: Tensor, hand: Selection, other: Tensor, pieces: Sequence[Piece]) -> None:
        """The inverse: every element of `own` to its place in `other`."""
        other.index_copy_(0, self._of(hand, pieces, other.numel()).long(), own)

    def _of(self, hand: Selection, pieces: Sequence[Piece], elements: int) -> Tensor:
        """(copies * N,) addresses in a buffer of so many elements."""
        table = torch.from_numpy(self._starts_and_strides(hand, pieces, np.int32 if elements < _INT32_ELEMENTS else np.int64))
        if self._device.type == "cuda":
            table = table.pin_memory()  # from torch's own pool, which waits until the copy is done before it lends it again
        chosen = table.to(self._device, non_blocking=True).index_select(1, self._line)
        return torch.addcmul(chosen[:-1], chosen[-1], self._rest).view(-1)

    def _starts_and_strides(self, hand: Selection, pieces: Sequence[Piece], number: type) -> np.ndarray:
        """(copies + 1, lines): the starts in each copy, and the strides."""
        table = np.empty((self._copies + 1, self._count), number)
        sizes = np.array([piece.layout.numel for piece in pieces])
        places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for group, name, dimension, lines in self._members:
            if group.name not in places:
                places[group.name] = _places(group, hand, pieces)
            holder, position = places[group.name]
            begins = np.array([piece.start + piece.layout.offsets[name] for piece in pieces])[holder]
            widths = np.array([piece.layout.shapes[name][dimension] for piece in pieces])[holder]
            rest = torch.Size(self._layout.shapes[name]).numel() // len(holder)
            for copy in range(self._copies):
                table[copy, lines] = begins + copy * sizes[holder] + position * (1 if dimension else rest)
            table[-1, lines] = widths if dimension else 1
        return table


def _places(group: FilterGroup, hand: Selection, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Of each filter of `hand`: the piece that holds it, and where in that piece's hand it stands."""
    holder, position = np.empty(group.width, np.int64), np.empty(group.width, np.int64)
    for number, piece in enumerate(pieces):
        filters = piece.hand[group.name].numpy()
        holder[filters], position[filters] = number, np.arange(len(filters))
    wanted = hand[group.name].numpy()
    return holder[wanted], position[wanted]
