"""Searching a ticket at initialisation: weights stay as they were drawn, what is trained is a score for each (Gem-Miner, edge-popup)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from loft_hpc import seeds
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.models.scores import filter_scores
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.tickets.source import Workshop
from loft_hpc.training.buffers import Layout, ParameterBuffer
from loft_hpc.training.evaluation import network_for
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.stopwatch import Stopwatch
from loft_hpc.training.strategy import Advance, Strategy, bits, refuse_other_network, summed
from loft_hpc.training.trainer import accumulate_gradients, sgd_step, stop_statistics

STRETCH_STEPS = 8
ROUNDING = 0.5
"""Scores above it round to 1."""


def signed_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight +-sqrt(2 / fan_in), signs as in `state`; normalisations at 1 and 0, biases at 0 (Gem-Miner's release; facts: tickets.md)."""
    made = {}
    for name, tensor in state.items():
        if tensor.dim() > 1:
            made[name] = torch.where(tensor < 0, -1.0, 1.0) * math.sqrt(2 / tensor[0].numel())
        else:
            made[name] = torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
    return made


def freezings(epochs: int, every: int, steps_per_epoch: int, weights: int, keep: int) -> list[tuple[int, int]]:
    """(step, weights that stay alive after it): n = floor((epochs - 1) / every) freezings, each leaving the same share of what is alive.

    The last one leaves exactly `keep` of `weights`. Where there is no room for any, one at the very end does.
    """
    times = (epochs - 1) // every
    if times < 1:
        return [(epochs * steps_per_epoch, keep)]
    return [(time * every * steps_per_epoch, round(weights * (keep / weights) ** (time / times))) for time in range(1, times + 1)]


def score_gradient(gradient: Tensor, weights: Tensor, scores: Tensor, alive: Tensor, regulariser: float) -> Tensor:
    """Of loss + regulariser * sum(scores^2), given the loss's gradient with respect to the effective weights w * 1[p > 1/2] * q.

    Straight through: the derivative of the rounding is taken as 1, so dloss/dp = dloss/dw_eff * w, for weights that are alive (q).
    """
    return (gradient * weights + 2 * regulariser * scores) * alive


@dataclass(frozen=True)
class SearchRule:
    """What a search does with its scores. None of `freezings`, no `regulariser` and a `top` make edge-popup of Gem-Miner."""

    keep: int
    """Weights of the ticket."""
    regulariser: float = 0.0
    freezings: Sequence[tuple[int, int]] = ()
    top: Mapping[str, int] | None = None
    """Which weights are on: None for those whose score rounds to 1; else those with the highest scores, so many of each layer, or if empty,
    `keep` over all."""


class ScoreSearch(Strategy):
    """One rank's side; data-parallel: the effective weights' gradients are summed over the ranks, so scores are alike everywhere.

    Frozen weights are off for good: their score is 0 and has neither gradient nor momentum. Exact numbers are frozen, the lowest scores
    first; of equal scores the ones that lie last in the buffer.
    """

    any_world_size = True

    def __init__(self, shop: Workshop, weights: Mapping[str, Tensor], rule: SearchRule):
        self.total_steps, self.steps_per_epoch = shop.total_steps, shop.order.steps_per_epoch
        self._orders, self._batch = shop.order.in_parts(shop.batch_parts), shop.order.batch_size
        self.batch_images = sum(len(part.indices(0)) for part in self._orders)
        self._data, self._world, self._rule = shop.data, shop.world, rule
        self.schedule = Schedule(shop.optimisation, shop.total_steps, shop.order.steps_per_epoch)
        self._autocast = shop.computation.precision == "bfloat16"
        self._groups = filter_groups(shop.architecture)
        self._network = network_for(shop.architecture, None, weights, shop.device, "the initial state")
        stop_statistics(self._network)
        self._network.train()
        self._buffer = ParameterBuffer(dict(self._network.named_parameters()))
        self._weights = self._buffer.values.clone()
        self._searched = torch.zeros_like(self._weights)
        for view in self._buffer.layout.views(self._searched).values():
            view.fill_(float(view.dim() > 1))
        drawn = torch.rand(len(self._weights), generator=seeds.generator(shop.seed, "ticket")).to(shop.device)
        # what is not searched has score 1: it is on, and ranked by nobody
        self._scores = nn.Parameter(torch.where(self._searched.bool(), drawn, 1.0))
        self._scores.grad = torch.zeros_like(drawn)
        self._momentum = torch.zeros_like(drawn)
        self._alive = torch.ones_like(drawn)
        self._fate = torch.zeros_like(drawn)
        """Of frozen weights: how often weights were frozen before, plus the score that they had then."""
        self._step, self._exchanging = 0, Stopwatch(shop.device)
        self._switch()

    def advance(self, limit: int | None = None) -> Advance:
        ends = [step for step, _ in self._rule.freezings if step > self._step]
        end = min(self._step + STRETCH_STEPS, limit or self.total_steps, self.total_steps, *ends[:1])
        first, losses = self._step, []
        for parts in self._world.paced(self._data.train_parts(self._orders, first, end - first)):
            losses.append(self._train(parts))
            self._step += 1
        total, diverged_at = summed(torch.stack(losses), first, self._scores, self._momentum)
        for step, count in self._rule.freezings:
            if step == self._step and diverged_at is None:  # what is not finite is not ranked; the session ends here
                self._freeze(count)
        return Advance(self._step, total * self._world.size / len(losses), self._exchanging.take(), diverged_at=diverged_at)

    def _train(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self._buffer.gradient.zero_()
        loss = sum(accumulate_gradients(self._network, part, self._batch, self._autocast) for part in parts)
        with self._exchanging.running():
            self._world.all_reduce_(self._buffer.gradient, "gradient")()
        self._scores.grad.copy_(
            score_gradient(
                self._buffer.gradient, self._weights, self._scores.detach(), self._alive * self._searched, self._rule.regulariser
            )
        )
        lr, momentum = self.schedule.lr_at(self._step), self.schedule.optimisation.momentum
        sgd_step([self._scores], [self._scores.grad], [self._momentum], lr, momentum, 0)
        self._switch()
        return loss

    @torch.no_grad()
    def _switch(self) -> None:
        """Set the effective weights: those that are on."""
        if self._rule.top is None:
            self._scores.clamp_(0, 1)
            self._buffer.values.copy_(self._weights * (self._scores > ROUNDING) * self._alive)
            return
        self._buffer.values.copy_(self._weights)
        if not self._rule.top:
            off = ~_top(self._scores.where(self._searched.bool(), -torch.inf), self._rule.keep)
            self._buffer.values.masked_fill_(off & self._searched.bool(), 0)
            return
        scores = self._buffer.layout.views(self._scores.detach())
        for name, count in self._rule.top.items():
            view = self._buffer.views[name]
            view.masked_fill_(~_top(scores[name].flatten(), count).view(view.shape), 0)

    @torch.no_grad()
    def _freeze(self, count: int) -> None:
        """Leave `count` weights alive; all that the ticket has at once where no more than that are on as it is."""
        done = sum(step < self._step for step, _ in self._rule.freezings)
        candidates = (self._alive * self._searched).bool()
        on = int((candidates & (self._scores > ROUNDING)).sum())
        count = self._rule.keep if on <= self._rule.keep else count
        ranked = torch.where(candidates, self._scores.detach(), -1.0).cpu().numpy()
        gone = torch.from_numpy(np.argsort(-ranked, kind="stable")[count : int(candidates.sum())]).to(self._alive.device)
        self._fate[gone] = done + self._scores.detach()[gone]
        for tensor in (self._alive, self._scores, self._momentum):
            tensor[gone] = 0
        self._switch()

    def full_state(self) -> dict[str, Tensor]:
        return {name: view.clone() for name, view in self._buffer.views.items()}

    def filter_scores(self) -> dict[str, Tensor]:
        return filter_scores(self._buffer.views, self._groups)

    def digest(self) -> int:
        return bits(self._scores.detach()) + bits(self._momentum) + bits(self._alive)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}, {}

    def _tensors(self) -> dict[str, Tensor]:
        return {"scores": self._scores, "momentum": self._momentum, "alive": self._alive, "fate": self._fate}

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        own = self._tensors()
        refuse_other_network(checkpoint.tensors, own)
        for name, tensor in own.items():
            tensor.copy_(checkpoint.tensors[name])
        self._step = checkpoint.step
        self._switch()


def _top(scores: Tensor, count: int) -> Tensor:
    """Which of the (n,) scores are the `count` highest."""
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.topk(count).indices, True)


def searched_tensors(architecture: Architecture, flat: Tensor) -> dict[str, Tensor]:
    """The searched weights' part of a checkpoint's flat tensor, by name and in their shapes."""
    with torch.device("meta"):
        network = ResidualNetwork(architecture, architecture.hidden_widths())
    views = Layout({name: tuple(parameter.shape) for name, parameter in network.named_parameters()}).views(flat)
    return {name: view.contiguous() for name, view in views.items() if view.dim() > 1}
