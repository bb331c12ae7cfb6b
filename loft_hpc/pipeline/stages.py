"""Cutting a network into pipeline stages, between residual blocks.

Legend: K stages, one for each rank; n residual blocks, counted from 1; a cut "after block b" lets block b+1 begin the next stage.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor, nn

from loft_hpc.analysis.size import section_flops
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.training.buffers import Layout

Shape = tuple[int, int, int]

_BY_HAND = r"\d{1,9}(,\d{1,9})*"


def check_split(split: str) -> None:
    """Raises LoftError for a `--split` that no network could have."""
    if split in ("stages", "balanced"):
        return
    cuts = [int(block) for block in split.split(",")] if re.fullmatch(_BY_HAND, split) else [0]
    if any(later <= earlier for earlier, later in pairwise([0, *cuts])):
        raise LoftError(
            f"--split {split} is not known: stages, balanced, or the numbers of the blocks to cut after, ascending, as in 3,7,13",
            usage=True,
        )


def cuts(architecture: Architecture, split: str, stages: int, image_size: int) -> tuple[int, ...]:
    """The K-1 blocks to cut after.

    `stages`: where the network's own stages end, as in the poster (2 ranks: after stage 2 of 4; 4 ranks: after 1, 2, 3).
    `balanced`: such that the largest stage has as few FLOPs as possible. `3,7,13`: as said.
    Raises LoftError where the network has no such cuts.
    """
    blocks = sum(architecture.blocks)
    if stages > blocks:
        raise LoftError(f"{architecture.model} has {blocks} blocks, which make no {stages} pipeline stages: start at most {blocks} ranks")
    if split == "stages":
        return _at_stages(architecture, stages)
    if split == "balanced":
        return _balanced(section_flops(architecture, image_size), stages)
    chosen = tuple(int(block) for block in split.split(","))
    if len(chosen) != stages - 1:
        raise LoftError(f"--split {split} makes {len(chosen) + 1} stages for {stages} ranks: give {stages - 1} cut{'s' * (stages > 2)}")
    if chosen[-1] >= blocks:
        raise LoftError(
            f"--split {split} cuts after block {chosen[-1]}, but {architecture.model} has {blocks}: cut after 1 to {blocks - 1}"
        )
    return chosen


def _at_stages(architecture: Architecture, stages: int) -> tuple[int, ...]:
    own = len(architecture.blocks)
    if stages > own:
        raise LoftError(f"{architecture.model} has {own} stages, too few for {stages} ranks: use --split balanced, or name the cuts")
    ends = list(accumulate(architecture.blocks))
    # Evenly over the network's stages; where that falls between two, the later one.
    return tuple(ends[(2 * k * own + stages) // (2 * stages) - 1] for k in range(1, stages))


def _balanced(flops: Sequence[int], stages: int) -> tuple[int, ...]:
    """The linear partition with the smallest largest part. `flops`: of stem, blocks, head; stem and head stay with their block."""
    weights = list(flops[1:-1])
    weights[0] += flops[0]
    weights[-1] += flops[-1]
    before = [0, *accumulate(weights)]
    blocks = len(weights)
    # best[b]: (largest part, cuts) of the first b blocks in k parts
    best = {b: (before[b], ()) for b in range(1, blocks + 1)}
    for k in range(2, stages + 1):
        best = {b: min((max(best[c][0], before[b] - before[c]), (*best[c][1], c)) for c in range(k - 1, b)) for b in range(k, blocks + 1)}
    return best[blocks][1]


@dataclass(frozen=True)
class Part:
    """What one rank holds: blocks `first` to `last` (from 1, both included), the stem at the beginning, the head at the end."""

    first: int
    last: int
    blocks: int

    @property
    def begins(self) -> bool:
        return self.first == 1

    @property
    def ends(self) -> bool:
        return self.last == self.blocks

    def borders(self, outputs: Sequence[Shape]) -> tuple[Shape | None, Shape | None]:
        """(C, H, W) of one image where it comes from the stage before and where it goes to the next one (None at the network's ends), out
        of what every block hands over."""
        return None if self.begins else outputs[self.first - 2], None if self.ends else outputs[self.last - 1]

    def parameters(self, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> Layout:
        """The layout of this part's parameters, out of the full network's shapes."""
        number = {block.name: index for index, block in enumerate(architecture.block_shapes(), start=1)}
        mine = {}
        for name, shape in shapes.items():
            block = number.get(".".join(name.split(".")[:2]))
            if (block is None and (self.ends if name.startswith("fc.") else self.begins)) or (block and self.first <= block <= self.last):
                mine[name] = shape
        return Layout(mine)


def parts(architecture: Architecture, chosen: Sequence[int]) -> list[Part]:
    """Every stage's part of the network, for the cuts chosen."""
    blocks = sum(architecture.blocks)
    return [Part(earlier + 1, later, blocks) for earlier, later in pairwise([0, *chosen, blocks])]


class Stage(nn.Module):
    """One part of a network; its parameters are the network's own.

    Input (N, C, H, W): images, or what the stage before hands over; output the same for the next one, or (N, num_classes).
    """

    def __init__(self, network: ResidualNetwork, part: Part):
        super().__init__()
        sections = network.sections()
        first = 0 if part.begins else part.first
        last = len(sections) - 1 if part.ends else part.last
        self.sections = nn.Sequential(*sections[first : last + 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.sections(x)
