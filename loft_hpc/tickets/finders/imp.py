"""Iterative magnitude pruning, with rewinding of the weights or of the learning rate alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import parameters_of
from loft_hpc.runs.snapshots import point_of
from loft_hpc.tickets.counts import kept_of_all
from loft_hpc.tickets.finders.gem_miner import SearchOptions
from loft_hpc.tickets.finders.magnitude import as_mask
from loft_hpc.tickets.masks import WeightMask, refuse_strange, weight_shapes
from loft_hpc.tickets.pruning import Found, option, register
from loft_hpc.tickets.source import FINAL, INITIAL, Recipe, Source, Workshop
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.interval import Interval

KEEP_WEIGHTS = "none"


@dataclass(frozen=True)
class ImpOptions(SearchOptions):
    level_ratio: float = option(0.2, "Share of the remaining weights that each level of imp removes.")
    rewind_to: str = option(
        INITIAL,
        "Where each level of imp starts again: init, 500it or 2ep (a snapshot of the run), or none to keep the trained weights and rewind "
        "the learning rate alone.",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.level_ratio < 1:
            raise LoftError(f"--level-ratio {self.level_ratio:g} must lie between 0 and 1", usage=True)
        if self.rewind_to not in (INITIAL, KEEP_WEIGHTS):
            Interval.parse(self.rewind_to, "--rewind-to")


def level_counts(weights: int, level_ratio: float, least: int) -> list[int]:
    """Weights alive at each level, from 0 (all) on, as long as there are more than `least`."""
    counts, level = [weights], 1
    while (count := min(round(weights * (1 - level_ratio) ** level), counts[-1] - 1)) > least:
        counts.append(count)
        level += 1
    return counts


def _kept(sizes: Mapping[str, int], ratios: Sequence[float]) -> dict[float, int]:
    return {ratio: kept_of_all(sizes, ratio, "weights") for ratio in ratios}


def _levels(options: Any, dense: Architecture, ratios: Sequence[float]) -> int:
    """Levels after the run itself."""
    sizes = {name: shape.numel() for name, shape in weight_shapes(dense).items()}
    return len(level_counts(sum(sizes.values()), options.level_ratio, min(_kept(sizes, ratios).values()))) - 1


def _label(options: Any) -> list[str]:
    return [options.rewind_to, *([] if options.level_ratio == 0.2 else [f"by{options.level_ratio:g}"])]


@register("imp", "iterative magnitude pruning: the smallest weights go, the rest is rewound and trained again, over and over", ImpOptions,
          label=_label, removes_filters=lambda options: False, trainings=_levels)  # fmt: skip
def imp(source: Source, options: ImpOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """Iterative magnitude pruning (Frankle & Carbin 2019, arXiv 1803.03635; rewinding: 1912.05671; learning rate alone: 2003.02389).

    Level 0 is the run itself. Each level removes `--level-ratio` of the remaining weights, those of the smallest magnitude over all layers,
    rewinds the others and trains them data-parallel for the run's epochs, the schedule going on from where it was rewound to. A ticket is
    pruned to its exact count from the last level that is denser; its own training is `loft retrain`. Levels are kept under RUN/searches
    and not trained twice, so several ratios share them.
    """
    if source.at != FINAL:
        raise LoftError("--method imp starts from the run's final network: leave --at away", usage=True)
    shapes = weight_shapes(source.architecture)
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    keep = _kept(sizes, ratios)
    counts = level_counts(sum(sizes.values()), options.level_ratio, min(keep.values()))
    full = [ratio for ratio in ratios if keep[ratio] == sum(sizes.values())]
    if full:
        raise LoftError(f"--ratio {full[0]:g} removes none of {keep[full[0]]} weights: give a larger one")
    start, skipped = _rewound(source, options)
    found: dict[float, Found] = {}
    alive = {name: torch.ones(shape, dtype=torch.uint8) for name, shape in shapes.items()}
    fate = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state, file, cost = source.state(FINAL), source.file(FINAL), source.cost(FINAL)
    for level, count in enumerate(counts):
        if level:
            weights = start or state
            mask = dict(alive)

            def make(shop: Workshop, weights: Mapping[str, Tensor] = weights, mask: Mapping[str, Tensor] = mask) -> DataParallel:
                return DataParallel(
                    shop.architecture, None, weights, shop.optimisation, shop.data, shop.order, shop.total_steps - skipped, shop.computation,
                    shop.device, shop.world, mask, shop.batch_parts, skipped,
                )  # fmt: skip

            details = {**asdict(options), "level": level, "count": count}
            name = "-".join(["imp", *_label(options)])
            trained = source.train(f"{name}/level-{level:02d}", Recipe(options.search_epochs, options.search_lr, None, details), make)
            state, cost = parameters_of(trained.run.read_model()), cost + trained.cost
            refuse_strange(state, source.architecture)
            file = str(trained.run.model_path.relative_to(source.run.path))
        magnitudes = {name: torch.where(alive[name].bool(), state[name].abs(), -1.0) for name in shapes}
        for ratio in ratios:
            denser = count > keep[ratio]
            if denser and not (level + 1 < len(counts) and counts[level + 1] > keep[ratio]):
                mask = WeightMask(source.architecture, _largest(magnitudes, keep[ratio]))
                scores = {name: torch.where(alive[name].bool(), level + _squashed(magnitudes[name]), fate[name]) for name in shapes}
                from_ = (parameters_of(state), file) if start is None else (start, source.file(_point(source, options.rewind_to)))
                details = {"levels": level + 1}
                found[ratio] = Found(ratio, mask, *from_, cost, scores, details)
        if level + 1 < len(counts):
            after = _largest(magnitudes, counts[level + 1])
            for name in shapes:
                gone = alive[name].bool() & ~after[name].bool()
                fate[name][gone] = level + _squashed(magnitudes[name])[gone]
            alive = after
    yield from (found[ratio] for ratio in ratios)


def _squashed(magnitudes: Tensor) -> Tensor:
    """Into [0, 1), in the same order, whatever their size: so that a later level always counts more."""
    return magnitudes.clamp(min=0) / (1 + magnitudes.clamp(min=0))


def _largest(magnitudes: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """0/1 over the weights: the `count` largest of all."""
    flat = {name: tensor.flatten().double().numpy() for name, tensor in magnitudes.items()}
    order = np.argsort(-np.concatenate(list(flat.values())), kind="stable")[:count]
    masks, start = {}, 0
    for name, values in flat.items():
        own = order[(order >= start) & (order < start + len(values))] - start
        masks[name] = as_mask(np.sort(own), magnitudes[name].shape)
        start += len(values)
    return masks


def _point(source: Source, rewind_to: str) -> str:
    """The run's snapshot at that step. Raises LoftError where there is none."""
    if rewind_to == INITIAL:
        return INITIAL
    step = Interval.parse(rewind_to, "--rewind-to").steps(source.run.required("steps_per_epoch", int))
    snapshots = source.run.snapshots
    for name in snapshots.names():
        if snapshots.step(name) == step:
            return point_of(name)
    there = sorted(snapshots.step(name) for name in snapshots.names())
    nearest = min(there, key=lambda other: abs(other - step), default=0)
    raise LoftError(
        f"{source.run.path} has no full network of step {step} to rewind to, only of {', '.join(map(str, there))}: "
        f"give --rewind-to {f'{nearest}it' if nearest else INITIAL}, or pretrain with a --snapshot-every whose snapshots meet it"
    )


def _rewound(source: Source, options: ImpOptions) -> tuple[dict[str, Tensor] | None, int]:
    """The weights that levels start from, None for those they ended with, and the steps of their schedule that lie before.

    Raises LoftError where no steps would be left.
    """
    if options.rewind_to == KEEP_WEIGHTS:
        return None, 0
    point = _point(source, options.rewind_to)
    if point == INITIAL:
        return parameters_of(source.state(INITIAL)), 0
    per_epoch = source.steps_per_epoch
    skipped, steps = Interval.parse(options.rewind_to, "--rewind-to").steps(per_epoch), (options.search_epochs or source.epochs) * per_epoch
    if skipped >= steps:
        raise LoftError(f"--rewind-to {options.rewind_to} leaves nothing of a level's {steps} steps to train: give more --search-epochs")
    return parameters_of(source.state(point)), skipped
