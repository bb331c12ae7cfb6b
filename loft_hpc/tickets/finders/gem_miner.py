"""Tickets at initialisation by trained scores: Gem-Miner, and edge-popup."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.tickets.counts import kept_of_all, kept_of_each
from loft_hpc.tickets.finders.magnitude import SCOPES, chosen_weights
from loft_hpc.tickets.masks import WeightMask, weight_shapes
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.score_search import ScoreSearch, SearchRule, freezings, searched_tensors, signed_constants
from loft_hpc.tickets.source import INITIAL, Recipe, Source, Workshop
from loft_hpc.training.settings import MAX_EPOCHS, MAX_FLOAT32, refuse_outside

PAPER_REGULARISERS = ((0.0144, 1e-4), (0.0372, 3e-5), (0.5, 1e-8))
"""(density, lambda) of ResNet-20 on CIFAR-10 (facts: tickets.md)."""
PAPER_STEPS = 150 * 390
PAPER_LR = 0.1
PAPER_FREEZINGS = 29


@dataclass(frozen=True)
class SearchOptions:
    search_epochs: int | None = option(None, "Epochs of the search; those of the run if not given.")
    search_lr: float | None = option(
        None, "Learning rate of a search; if not given, the run's, and for scores 0.1 * (58,500 / steps)^(3/4)."
    )

    def __post_init__(self):
        check_choices(self)
        if self.search_epochs is not None and not 1 <= self.search_epochs <= 1_000_000:
            raise LoftError("--search-epochs must lie between 1 and 1,000,000", usage=True)
        if self.search_lr is not None and not 0 < self.search_lr <= MAX_FLOAT32:
            raise LoftError(f"--search-lr {self.search_lr} must be a number above 0, and at most {MAX_FLOAT32:g}", usage=True)


@dataclass(frozen=True)
class ScoreOptions(SearchOptions):
    seed: int = option(0, "")


@dataclass(frozen=True)
class GemMinerOptions(ScoreOptions):
    freeze_every: int | None = option(
        None, f"Epochs between freezings; if not given, as makes about {PAPER_FREEZINGS} of them, at least 1."
    )
    regulariser: float | None = option(None, "Factor on the scores' squares in the loss; if not given, the paper's for the density.")

    def __post_init__(self):
        super().__post_init__()
        refuse_outside(self, freeze_every=(1, MAX_EPOCHS), regulariser=(0, MAX_FLOAT32))


def paper_regulariser(density: float) -> float:
    """Between the paper's densities on a line through the logarithms, outside of them the nearest one's."""
    points = [(math.log(at), math.log(value)) for at, value in PAPER_REGULARISERS]
    x = min(max(math.log(density), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next((low, high) for low, high in itertools.pairwise(points) if x <= high[0])
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def search_rate(steps: int) -> float:
    """The learning rate of scores for a search of so many steps: the paper's 0.1 for its own number, more for fewer.

    Gradients of scores are small, and a score that starts near 0 must come past 1/2 before it is frozen: with the paper's rate a search of a
    few hundred steps moves nothing. The exponent is chosen here (textures, 2 % density, 672 steps, two seeds: 28 to 30 % accuracy after
    finetuning at rate 1, 33 and 34 % at 3, 28 and 32 % at 8.7, which would be in proportion).
    """
    return PAPER_LR * (PAPER_STEPS / steps) ** 0.75


def one_for_each_ratio(options: Any, dense: Architecture, ratios: Sequence[float]) -> int:
    return len(ratios)


@register("gem-miner", "weights at initialisation, by scores that are trained, rounded and frozen", GemMinerOptions,
          default_at=lambda options: INITIAL, label=lambda options: [f"seed{options.seed}"],
          removes_filters=lambda options: False, trainings=one_for_each_ratio)  # fmt: skip
def gem_miner(source: Source, options: GemMinerOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """Gem-Miner (Sreenivasan et al. 2022, "Rare Gems", arXiv 2202.12002; facts: tickets.md).

    Weights are signed constants, with the signs of the run's initialisation; normalisations and biases are not trained. Scores start
    uniform in [0, 1] and are clamped to it; the search is one training of `--search-epochs` epochs, cosine, without weight decay. Finetuning
    is `loft retrain`, in which normalisations and biases take part. A weight's rank is by the freezing that it survived, then its score.
    """
    kept = _kept(source, ratios)
    for ratio in ratios:

        def make(shop: Workshop, ratio: float = ratio, keep: int = kept[ratio]) -> ScoreSearch:
            total = sum(shape.numel() for shape in weight_shapes(shop.architecture).values())
            epochs = shop.total_steps // shop.order.steps_per_epoch
            every = options.freeze_every or max(1, round((epochs - 1) / PAPER_FREEZINGS))
            regulariser = options.regulariser
            if regulariser is None:
                regulariser = paper_regulariser(1 - ratio)
            rule = SearchRule(keep, regulariser, freezings(epochs, every, shop.order.steps_per_epoch, total, keep))
            return ScoreSearch(shop, signed_constants(_parameters(source)), rule)

        trained = source.train(_name("gem-miner", options, ratio), _recipe(options, ratio), make)
        tensors = trained.last_checkpoint(("scores", "alive", "fate"), source.architecture)
        alive = searched_tensors(source.architecture, tensors["alive"])
        # who is alive at the end comes after all who were frozen
        scores = searched_tensors(source.architecture, torch.where(tensors["alive"] > 0, tensors["scores"] + 1e3, tensors["fate"]))
        mask = WeightMask(source.architecture, {name: (values > 0).to(torch.uint8) for name, values in alive.items()})
        yield _found(source, ratio, mask, scores, trained.cost)


@dataclass(frozen=True)
class EdgePopupOptions(ScoreOptions):
    scope: str = option("layer", "", SCOPES)


@register("edge-popup", "weights at initialisation, by trained scores alone: Gem-Miner without regulariser and freezing", EdgePopupOptions,
          default_at=lambda options: INITIAL,
          label=lambda options: [*([] if options.scope == "layer" else [options.scope]), f"seed{options.seed}"],
          removes_filters=lambda options: False, trainings=one_for_each_ratio)  # fmt: skip
def edge_popup(source: Source, options: EdgePopupOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """Edge-popup (Ramanujan et al. 2020, arXiv 1911.13299): at every step the weights with the highest scores are on, as many as the ticket has.

    The same share of every layer, as in the paper, or over all (`--scope global`, as in the Gem-Miner paper). Everything else is as in `gem_miner`.
    """
    kept = _kept(source, ratios)
    for ratio in ratios:
        sizes = {name: shape.numel() for name, shape in weight_shapes(source.architecture).items()}
        counts = kept_of_each(sizes, ratio, "weights") if options.scope == "layer" else {}
        rule = SearchRule(kept[ratio], top=counts)

        def make(shop: Workshop, rule: SearchRule = rule) -> ScoreSearch:
            return ScoreSearch(shop, signed_constants(_parameters(source)), rule)

        trained = source.train(_name("edge-popup", options, ratio), _recipe(options, ratio), make)
        scores = searched_tensors(source.architecture, trained.last_checkpoint(("scores",), source.architecture)["scores"])
        mask = WeightMask(source.architecture, chosen_weights(scores, ratio, options.scope, 0.0))
        yield _found(source, ratio, mask, scores, trained.cost)


def _kept(source: Source, ratios: Sequence[float]) -> dict[float, int]:
    """Weights that stay at each ratio: what cannot be is told before anything is searched."""
    if source.at != INITIAL:
        raise LoftError("trained scores rank weights at initialisation: leave --at away", usage=True)
    sizes = {name: shape.numel() for name, shape in weight_shapes(source.architecture).items()}
    return {ratio: kept_of_all(sizes, ratio, "weights") for ratio in ratios}


def _parameters(source: Source) -> dict[str, torch.Tensor]:
    return source.state(INITIAL)


def _found(source: Source, ratio: float, mask: WeightMask, scores: dict[str, torch.Tensor], cost: Any) -> Found:
    details = {"initialisation": "signed-constants"}
    return Found(ratio, mask, signed_constants(_parameters(source)), source.file(INITIAL), cost, scores, details)


def _recipe(options: ScoreOptions, ratio: float) -> Recipe:
    return Recipe(options.search_epochs, options.search_lr or search_rate, 0.0, {"ratio": ratio, **asdict(options)})


def _name(method: str, options: ScoreOptions, ratio: float) -> str:
    scope = [options.scope] if getattr(options, "scope", "layer") != "layer" else []
    return "-".join([method, *scope, f"seed{options.seed}", f"{ratio:g}"])
