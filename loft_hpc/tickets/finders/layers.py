"""Whole residual blocks: layer tickets, at initialisation or after training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loft_hpc.analysis.size import network_size
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.scores import removed_count
from loft_hpc.tickets.block_scores import BLOCK_CRITERIA, BlockScoring, lowest_blocks, removable
from loft_hpc.tickets.counts import least_ratio
from loft_hpc.tickets.masks import BlockMask
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.source import FINAL, INITIAL, Source
from loft_hpc.tickets.ticket import Cost

FORWARD_PASSES = {"random": 0, "l1": 0, "snip": 3, "grasp": 12, "kl": 2}
"""What a criterion computes on an image, in forward passes: a backward pass counts two, one through a backward pass twice as much; kl runs a
part of the network anew for each block, counted as one more. hrank and pls look at fewer images than asked for."""
AT_INITIALISATION = ("snip", "grasp", "random", "l1")


@dataclass(frozen=True)
class LayerOptions:
    criterion: str = option("grasp", "What a residual block is worth.", tuple(BLOCK_CRITERIA))
    scoring_batches: int = option(8, "Batches of training images over which blocks are scored.")
    scoring_batch: int = option(64, "Images in each of those batches.")
    seed: int = option(0, "")

    def __post_init__(self):
        check_choices(self)
        for name in ("scoring_batches", "scoring_batch"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise LoftError(f"--{name.replace('_', '-')} must lie between 1 and 10,000", usage=True)


def _default_at(options: Any) -> str:
    return INITIAL if options.criterion in AT_INITIALISATION else FINAL


def _label(options: Any) -> list[str]:
    return [options.criterion, *([f"seed{options.seed}"] if options.criterion == "random" else [])]


def _amount(ratio: float, dense: Architecture) -> str:
    blocks = len(removable(dense))
    return f"{removed_count(blocks, ratio)}of{blocks}"


def _shallower(ratio: float, dense: Architecture) -> Architecture:
    blocks = removable(dense)
    gone = lowest_blocks(dict.fromkeys(blocks, 0.0), dense, removed_count(len(blocks), ratio))
    return BlockMask(dense, [shape.name for shape in dense.block_shapes() if shape.name not in gone]).architecture


@register("layers", "whole residual blocks, at initialisation (snip, grasp) or after training", LayerOptions,
          default_at=_default_at, label=_label, amount=_amount, removes_filters=lambda options: False,
          shallower=_shallower)  # fmt: skip
def layers(source: Source, options: LayerOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """The lowest-scored residual blocks go, all at once (arXiv 2301.10835; facts: tickets.md).

    The ratio is that of the blocks that keep their shape, the others stay: their number is rounded down, and must be at least one. Scores
    are taken where the run stood at `--at`: by default at initialisation for snip, grasp, l1 and random, and after training for the
    others; `loft retrain --rewind init` starts the shallower network over.
    """
    blocks, count = removable(source.architecture), {}
    for ratio in ratios:
        count[ratio] = removed_count(len(blocks), ratio)
        if not count[ratio]:
            raise LoftError(
                f"--ratio {ratio:g} of the {len(blocks)} residual blocks that may go is none: give --ratio {least_ratio(len(blocks))} or more"
            )
    scoring = BlockScoring(options.scoring_batches, options.scoring_batch, options.seed)
    scores = BLOCK_CRITERIA[options.criterion](source.network(source.at), source.data, scoring, source.world)
    names = [shape.name for shape in source.architecture.block_shapes()]
    worth = {"blocks": torch.tensor([scores.get(name, 0.0) for name in names])}
    info = source.data.info
    passes = FORWARD_PASSES.get(options.criterion, 1)
    samples = min(options.scoring_batches * options.scoring_batch, info.train_images) if passes else 0
    scored = Cost(
        samples / info.train_images, samples, float(passes * samples * network_size(source.architecture, None, info.image_size).flops)
    )
    for ratio in ratios:
        gone = lowest_blocks(scores, source.architecture, count[ratio])
        mask = BlockMask(source.architecture, [name for name in names if name not in gone])
        yield Found(
            ratio, mask, source.state(source.at), source.file(source.at), source.cost(source.at) + scored, worth,
            {"removed_blocks": sorted(gone, key=names.index)},
        )  # fmt: skip
