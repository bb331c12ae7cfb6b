"""How much every residual block is worth, by several criteria: a layer ticket goes without the blocks that are worth least.

Source: "When Layers Play the Lottery, all Tickets Win at Initialization", arXiv 2301.10835. Scored are the blocks that keep their
shape, and no others: without such a block its shortcut is left, the identity (in a post-activation network too, where what comes in
has been through a ReLU). Blocks that change shape always stay.

A criterion sees calibration batches, batch b on rank b % size, as purpose `control`. Larger is worth more; all ranks get the same
scores, and any number of ranks does up to the order of summation. Gradients are taken with the statistics of each batch, as in
training; activations with those that the network has, which the caller re-estimates first. The network is left as it was found.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loft_hpc import seeds
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.training.settings import MAX_IMAGES_AT_ONCE, MAX_STATISTICS_BATCHES
from loft_hpc.training.trainer import stop_statistics

HRANK_IMAGES = 128
"""Each costs a singular value decomposition per channel, and mean ranks hardly depend on how many are seen (HRank, section 3)."""
PLS_IMAGES = 1024
"""Their features are put together on every rank: (images, channels of all blocks) float64."""
PLS_COMPONENTS = 2
_ROUNDING = 1e-6
"""Relative to a feature's size: what differs by no more between images is the same."""


@dataclass(frozen=True)
class BlockScoring:
    """By what blocks are scored: at most so many batches of training images, not augmented, the same in every run."""

    batches: int = 16
    batch_size: int = 64
    seed: int = 0
    """For `random`."""

    def __post_init__(self):
        if not 1 <= self.batches <= MAX_STATISTICS_BATCHES:
            raise LoftError(f"blocks are scored over 1 to {MAX_STATISTICS_BATCHES:,} batches, not {self.batches}", usage=True)
        if not 2 <= self.batch_size <= MAX_IMAGES_AT_ONCE:  # one image has no variance
            raise LoftError(f"blocks are scored over batches of 2 to {MAX_IMAGES_AT_ONCE:,} images, not {self.batch_size}", usage=True)
        if self.seed < 0:
            raise LoftError(f"--seed {self.seed} must be 0 or more", usage=True)


def removable(architecture: Architecture) -> list[str]:
    """Names of the blocks that keep their shape, in forward order: what is scored, and can be taken out."""
    return [block.name for block in architecture.block_shapes() if not block.changes_shape]


def lowest_blocks(scores: Mapping[str, float], architecture: Architecture, count: int) -> list[str]:
    """The `count` removable blocks that are worth least, the lowest first; among equals the later block goes first.

    Every stage keeps a block: of stage 1, whose blocks all keep their shape, the one worth most. What goes with a smaller count goes
    with a larger one too. Raises LoftError, naming the largest possible count, where so many cannot go.
    """
    left = Counter(block.stage for block in architecture.block_shapes())
    shapes = [block for block in architecture.block_shapes() if not block.changes_shape]
    going = []
    for place in sorted(range(len(shapes)), key=lambda place: (scores[shapes[place].name], -place)):
        block = shapes[place]
        if left[block.stage] > 1:
            left[block.stage] -= 1
            going.append(block.name)
    if not 0 <= count <= len(going):
        raise LoftError(
            f"{count} blocks cannot be taken out of {architecture.model}, at most {len(going)} can: "
            "blocks that change shape stay, and every stage keeps one"
        )
    return going[:count]


# -- of the weights and their gradients -----------------------------------------------------------------------------------


@torch.enable_grad()
def snip(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Sum of |w * g| over a block's convolution weights (SNIP, Lee et al. 2019, arXiv 1810.02340, not normalised).

    g is the gradient of the mean loss over all calibration images. |w * g| estimates to first order how much the loss changes when
    w alone is removed. The layer paper does not say how a block's weights are put together: the sum, our choice, bounds the
    estimate for all of them at once, so a block counts by all that it does; a mean would divide by its size.
    """
    blocks = _convolutions(network)
    weights = [weight for convolutions in blocks.values() for weight in convolutions]
    with _left_as_found(network, training=True):
        gradient = _mean_gradient(network, weights, data, scoring, world)

    def total(convolutions: list[nn.Parameter]) -> float:
        return sum(float((weight.detach() * gradient[weight]).abs().sum(dtype=torch.float64)) for weight in convolutions)

    return _of_rank_0(lambda: {name: total(convolutions) for name, convolutions in blocks.items()}, world)


@torch.enable_grad()
def grasp(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Sum of w * (H g) over a block's convolution weights (GraSP, Wang et al. 2020, arXiv 2002.07376, its sign turned).

    g is the gradient of the mean loss over all calibration images by the weights of all convolutions and of the classifier, as in
    the original, H that loss's Hessian. GraSP removes the weights with the highest -w * (H g), whose removal adds to the gradient
    flow. The signed sum is what half the squared gradient norm loses, to first order, when the whole block is removed: a block
    worth little lets more gradient flow by going. The softmax has temperature 1; the original's 200 is left out.

    Where batch statistics normalise what a convolution gives, the loss does not depend on the scale of its weights, and its part of
    the sum is -|g|^2: in a post-activation network the blocks with the largest gradients go first.

    Two passes over the batches: the gradient, then its products with each batch's Hessian, of which scalars alone are sent.
    """
    blocks = _convolutions(network)
    weights = [module.weight for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    scored = [(name, weight) for name, convolutions in blocks.items() for weight in convolutions]
    totals, seen = _zeros(network, blocks), 0
    with _left_as_found(network, training=True):
        mean = _mean_gradient(network, weights, data, scoring, world)
        for _, images, labels in _batches(data, scoring, world):
            loss = F.cross_entropy(network(images), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            flow = sum((gradient * mean[weight]).sum() for weight, gradient in zip(weights, gradients, strict=True))
            seen += len(labels)
            products = torch.autograd.grad(flow, [weight for _, weight in scored])
            for (name, weight), product in zip(scored, products, strict=True):
                totals[name] += (weight.detach() * product).sum(dtype=torch.float64)
    return _averages(totals, seen, world)


def l1(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Mean |w| over a block's convolution weights, without a look at the data: a baseline, biased to early stages (arXiv 2301.10835)."""

    def mean(convolutions: list[nn.Parameter]) -> float:
        return float(torch.cat([weight.detach().double().abs().flatten() for weight in convolutions]).mean())

    return _of_rank_0(lambda: {name: mean(convolutions) for name, convolutions in _convolutions(network).items()}, world)


def random(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Uniform between 0 and 1, from the seed alone."""
    draw = np.random.default_rng(seeds.derive(scoring.seed, "ticket", 1))  # filter tickets draw from ("ticket",) itself
    return {name: float(draw.random()) for name in _convolutions(network)}


# -- of activations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hrank(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Mean rank of the (H, W) feature maps that a block hands on (HRank, Lin et al. 2020, arXiv 2002.10179).

    Over the first `HRANK_IMAGES` images of the batches, and all channels. Singular values below max(H, W) * epsilon times the
    largest, of the network's precision, count as none.
    """

    def ranks(maps: Tensor) -> Tensor:
        # the decomposition of what is not finite would raise on this rank alone
        return torch.linalg.matrix_rank(maps) if maps.isfinite().all() else maps.new_full(maps.shape[:2], math.nan)

    return _mean_of_outputs(network, _batches(data, scoring, world, HRANK_IMAGES), ranks, world)


@torch.no_grad()
def expect_abs(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Mean |activation| of what a block hands on: after the last ReLU, or the sum with the shortcut in a pre-activation network."""
    return _mean_of_outputs(network, _batches(data, scoring, world), lambda maps: maps.abs().mean((2, 3), dtype=torch.float64), world)


@torch.no_grad()
def kl(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Mean over images of KL(p || q) in nats: p the whole network's softmax, q that of the network without the block.

    As Luo and Wu 2020 (arXiv 1911.08114) judge filters. Costs half as many forward passes as the network has blocks: what comes
    before a block is computed once.
    """
    totals, seen = _zeros(network, _convolutions(network)), 0
    with _left_as_found(network, training=False):
        stem, *blocks, head = network.sections()
        for _, images, _ in _batches(data, scoring, world):
            x, without = stem(images), {}
            for number, (name, block) in enumerate(zip(_blocks(network), blocks, strict=True), start=1):
                if name in totals:
                    without[name] = nn.Sequential(*blocks[number:], head)(x).double().log_softmax(1)
                x = block(x)
            whole = head(x).double().log_softmax(1)
            for name, log_q in without.items():
                totals[name] += F.kl_div(log_q, whole, reduction="sum", log_target=True)
            seen += len(images)
    return _averages(totals, seen, world)


@torch.no_grad()
def pls(network: ResidualNetwork, data: DataSet, scoring: BlockScoring, world: World) -> dict[str, float]:
    """Mean over a block's channels of their importance for the label in a partial-least-squares regression.

    As Jordao et al. 2018 (arXiv 1810.07610) judge filters. The regression is from the globally averaged outputs of all blocks
    together (those that change shape too) to one-hot labels, over the first `PLS_IMAGES` images of the batches in their order.
    Rank 0 fits and tells the others.
    """
    blocks, classes = _blocks(network), data.info.num_classes
    ends = np.cumsum([block.conv2.out_channels for block in blocks.values()])
    rows = min(PLS_IMAGES, scoring.batches * scoring.batch_size)
    table = torch.zeros(rows, int(ends[-1]) + classes, dtype=torch.float64, device=_device(network))
    with _left_as_found(network, training=False):
        for first, images, labels in _batches(data, scoring, world, PLS_IMAGES):
            features = [maps.mean((2, 3), dtype=torch.float64) for _, maps in _outputs(network, images)]
            table[first : first + len(labels)] = torch.cat([*features, F.one_hot(labels, classes)], dim=1)
    world.all_reduce_(table, "control")()  # a row is zero on all ranks but one, so the sum is exact
    _refuse_nothing(int(table[:, ends[-1] :].sum()))
    table = table[table[:, ends[-1] :].any(1)].cpu().numpy()  # where there are fewer images, rows without a label are left

    def means() -> dict[str, float]:
        importance = np.split(_importance(table[:, : ends[-1]], table[:, ends[-1] :]), ends[:-1])
        return {
            name: float(part.mean()) for (name, block), part in zip(blocks.items(), importance, strict=True) if block.downsample is None
        }

    return _of_rank_0(means, world)


def _importance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Variable importance in projection of every feature, (features,), for a regression from (N, features) to (N, classes) one-hot labels.

    VIP_j = sqrt(J * sum_a S_a w_ja^2 / sum_a S_a): J features, w_ja the weight of feature j in component a (of length 1), S_a the
    variance of the labels that component a explains (Wold et al. 2001, Chemometrics 58). Its mean square over all features is 1.
    All are worth 0 where the features or the labels do not differ between images, and nothing is known (nan) of infinite features.
    """
    from sklearn.cross_decomposition import PLSRegression  # takes a second and more to import

    if not np.isfinite(features).all():
        return np.full(features.shape[1], np.nan)
    centred = features - features.mean(axis=0)
    centred[:, np.abs(centred).max(axis=0) <= _ROUNDING * np.abs(features).max(axis=0)] = 0  # or the regression would scale it up
    components = min(PLS_COMPONENTS, int(np.linalg.matrix_rank(centred @ centred.T, hermitian=True)))
    if components == 0 or not np.ptp(labels, axis=0).any():
        return np.zeros(features.shape[1])
    fitted = PLSRegression(components, tol=1e-14, max_iter=2000).fit(centred, labels)
    explained = (fitted.y_loadings_**2).sum(axis=0) * (fitted.x_scores_**2).sum(axis=0)
    return np.sqrt(features.shape[1] * (fitted.x_weights_**2 @ explained) / explained.sum())


BlockCriterion = Callable[[ResidualNetwork, DataSet, BlockScoring, World], dict[str, float]]

BLOCK_CRITERIA: dict[str, BlockCriterion] = {
    "snip": snip,
    "grasp": grasp,
    "hrank": hrank,
    "expect-abs": expect_abs,
    "kl": kl,
    "pls": pls,
    "l1": l1,
    "random": random,
}
"""Criteria by name: (network on its device, data, scoring, world) -> what each removable block is worth, in forward order.

All ranks call one together. It raises LoftError where a score is not finite, or where there are no images to score by.
"""


# -- what they share ------------------------------------------------------------------------------------------------------


def _blocks(network: ResidualNetwork) -> dict[str, nn.Module]:
    """All residual blocks under their names, in forward order."""
    return {f"{stage}.{index}": block for stage in network.stage_names for index, block in enumerate(network.get_submodule(stage))}


def _convolutions(network: ResidualNetwork) -> dict[str, list[nn.Parameter]]:
    """The convolution weights of every removable block."""
    return {name: [block.conv1.weight, block.conv2.weight] for name, block in _blocks(network).items() if block.downsample is None}


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _zeros(network: nn.Module, blocks: Iterable[str]) -> dict[str, Tensor]:
    """A float64 sum for every block."""
    return {name: torch.zeros((), dtype=torch.float64, device=_device(network)) for name in blocks}


@contextmanager
def _left_as_found(network: nn.Module, training: bool) -> Iterator[None]:
    """Inside, normalisations use the statistics of the batch (`training`) or those that the network has; none are recorded."""
    found = [(module, module.training, getattr(module, "track_running_stats", None)) for module in network.modules()]
    network.train(training)
    stop_statistics(network)
    try:
        yield
    finally:
        for module, mode, tracked in found:
            module.training = mode
            if tracked is not None:
                module.track_running_stats = tracked


def _batches(data: DataSet, scoring: BlockScoring, world: World, limit: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's calibration batches, of all ranks' first `limit` images together: (place of its first image, images, labels) each."""
    size = scoring.batch_size
    batches = scoring.batches if limit is None else min(scoring.batches, math.ceil(limit / size))
    for number, (images, labels) in enumerate(world.paced(data.calibration_batches(batches, size, world.rank, world.size))):
        first = (world.rank + number * world.size) * size
        within = slice(None if limit is None else limit - first)
        yield first, images[within], labels[within]


def _outputs(network: ResidualNetwork, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What every block hands on, (N, C, H, W), in forward order."""
    stem, *blocks, _ = network.sections()
    x = stem(images)
    for name, block in zip(_blocks(network), blocks, strict=True):
        x = block(x)
        yield name, x


def _mean_of_outputs(
    network: ResidualNetwork, batches: Iterable[tuple[int, Tensor, Tensor]], measure: Callable[[Tensor], Tensor], world: World
) -> dict[str, float]:
    """Mean over images and channels of what `measure` finds in every map: (N, C, H, W) -> (N, C)."""
    totals, seen = _zeros(network, _convolutions(network)), 0
    with _left_as_found(network, training=False):
        for _, images, _ in batches:
            for name, maps in _outputs(network, images):
                if name in totals:
                    totals[name] += measure(maps).double().mean(1).sum()
            seen += len(images)
    return _averages(totals, seen, world)


def _averages(totals: Mapping[str, Tensor], seen: int, world: World) -> dict[str, float]:
    """The blocks' sums over all ranks, by the images that all ranks have seen."""
    sums = torch.stack([*totals.values(), next(iter(totals.values())).new_tensor(seen)])
    world.all_reduce_(sums, "control")()
    *blocks, images = sums.tolist()
    _refuse_nothing(images)
    return _finite({name: total / images for name, total in zip(totals, blocks, strict=True)})


def _of_rank_0(compute: Callable[[], dict[str, float]], world: World) -> dict[str, float]:
    """What rank 0 computes, for all: what follows no collective may round otherwise on another machine."""
    return _finite(world.on_root(compute))


def _finite(scores: dict[str, float]) -> dict[str, float]:
    for name, score in scores.items():
        if not math.isfinite(score):
            raise LoftError(f"block {name} has no finite score: the network's weights are not finite, or too large", everywhere=True)
    return scores


def _mean_gradient(
    network: nn.Module, weights: Sequence[nn.Parameter], data: DataSet, scoring: BlockScoring, world: World
) -> dict[nn.Parameter, Tensor]:
    """The gradient of the mean loss over all images of all ranks, by each of these weights; sent in the network's own precision."""
    totals, seen = [torch.zeros_like(weight, requires_grad=False) for weight in weights], 0
    for _, images, labels in _batches(data, scoring, world):
        loss = F.cross_entropy(network(images), labels, reduction="sum")
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient
        seen += len(labels)
    sums = torch.cat([*(total.reshape(-1) for total in totals), totals[0].new_full((1,), seen)])
    world.all_reduce_(sums, "control")()
    _refuse_nothing(float(sums[-1]))
    parts = (sums[:-1] / sums[-1]).split([weight.numel() for weight in weights])
    return {weight: part.view(weight.shape) for weight, part in zip(weights, parts, strict=True)}


def _refuse_nothing(images: float) -> None:
    if not images:
        raise LoftError("blocks cannot be scored: the data set has no two training images", everywhere=True)
