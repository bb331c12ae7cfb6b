"""LoFT's Theorem 1, checked numerically (AISTATS 2023, arXiv 2210.16169; its statement: facts loft.md).

Legend: n images, each of p patches of q pixels (d = p q); m hidden filters; S workers; xi = 1/S the share of the filters that a worker
trains; kappa the standard deviation of the initial filters; eta the step size; T steps.

The poster states the theorem, not every detail of its model. What is computed here:

    worker    f_s(x; W) = 1/sqrt(m) * sum over the filters r of worker s, and over j, of a_rj * relu(<w_r, x_j>),
              x_j the j-th patch of x, w_r ~ N(0, kappa^2 I_q) trained, a_rj = +1 or -1 drawn once and fixed;
    network   f(x; W) = xi * (the same sum over all filters): the mean of the workers' outputs, and so of f_s over the deals;
    loss      L(W) = 1/2 * sum_i (f(x_i; W) - y_i)^2, images scaled to norm 1, labels +1 and -1; L_s the same of f_s;
    GD        W^_{t+1} = W^_t - eta * grad L(W^_t);
    LoFT      every `local_iterations` steps the filters are dealt to the S workers in equal, disjoint, uniformly drawn sets; then
              W_{t+1} = W_t - eta * 1/S * sum_s grad L_s(W_t), the mean of the workers' steps (a worker steps its own filters alone).

Where f_s = f the two take the same step; both start from the same W. With S = 1 they are the same, to the last bit.

Measured are the two terms of the theorem's left-hand side,

    weights   ||W_T - W^_T||_F^2          outputs   eta * sum over t < T of ||f(X, W_t) - f(X, W^_t)||_2^2,

averaged over D sequences of deals for every initialisation; the initialisations give the error bars. The first term is also split into
what the deals scatter and what they shift, E||W - W^||^2 = E||W - E W||^2 + ||E W - W^||^2, with unbiased estimates of both:

    spread    sum over deals of ||W - mean||^2, over D - 1           drift     ||mean - W^||^2 - spread / D

Everything in float64, on one thread, so that
figures do not depend on who computes them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.analysis.statistics import mean_interval


@dataclass(frozen=True)
class Problem:
    """The data of the theorem's model."""

    patches: Tensor
    """(n, p, q) float64; every image of norm 1."""
    labels: Tensor
    """(n,) float64, +1 and -1."""

    @property
    def kernel(self) -> Tensor:
        """The (n, n) neural tangent kernel of infinitely many filters.

        H_ik = sum_j <x_ij, x_kj> P(<w, x_ij> > 0 and <w, x_kj> > 0), w normal: the probability is (pi - angle) / (2 pi) (Cho and Saul
        2009). Products of different patches drop out, since their signs a are independent.
        """
        inner = torch.einsum("ijq,kjq->jik", self.patches, self.patches)
        norms = self.patches.norm(dim=2).T
        cosine = (inner / (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-300)).clamp(-1, 1)
        return (inner * (math.pi - torch.arccos(cosine)) / (2 * math.pi)).sum(0)

    @property
    def eigenvalues(self) -> tuple[float, float]:
        """(lambda_0, the largest) of the kernel."""
        values = torch.linalg.eigvalsh(self.kernel)
        return float(values[0]), float(values[-1])


def cut_into_patches(images: Tensor, labels: Tensor, size: int) -> Problem:
    """Images (n, C, H, W) in patches of (C, size, size) without overlap, scaled to norm 1, with labels +1 and -1."""
    count, channels, height, width = images.shape
    pieces = images.double().unfold(2, size, size).unfold(3, size, size)
    patches = pieces.permute(0, 2, 3, 1, 4, 5).reshape(count, (height // size) * (width // size), channels * size * size)
    return Problem(patches / patches.flatten(1).norm(dim=1)[:, None, None], labels.double())


@dataclass(frozen=True)
class Descent:
    """How the two trajectories are run."""

    eta: float
    steps: int
    local_iterations: int = 1
    kappa: float = 1.0


TERMS = ("weights", "spread", "drift", "outputs", "total")


@dataclass(frozen=True)
class Cell:
    """The left-hand side for one initialisation, one m and one S, averaged over deals."""

    filters: int
    workers: int
    start: int
    """Number of the initialisation."""
    weights: float
    outputs: float
    spread: float
    """Of `weights`, what differs between deals; not a number for a single one."""

    @property
    def drift(self) -> float:
        """Of `weights`, how far the mean over the deals is from gradient descent; an estimate, which may come out below 0."""
        return self.weights - self.spread

    @property
    def total(self) -> float:
        return self.weights + self.outputs


class _Trajectory:
    """One network from a start that (seed, m, start) decide, by GD or LoFT, with `workers` deciding how it is scaled."""

    def __init__(self, problem: Problem, descent: Descent, filters: int, workers: int, start: int, seed: int):
        draw = seeds.generator(seed, "theory", filters, start)
        count, places, pixels = problem.patches.shape
        self._rows = problem.patches.reshape(count * places, pixels)
        self._labels, self._workers, self._shape = problem.labels, workers, (count, places, filters)
        self._rate = descent.eta / (workers * math.sqrt(filters))  # 1/S: of f in GD, of the mean over the workers in LoFT
        self.weights = descent.kappa * torch.randn(filters, pixels, generator=draw, dtype=torch.float64)
        self._signs = torch.randint(0, 2, (places, filters), generator=draw).double() * 2 - 1

    def step(self, holder: Tensor | None) -> Tensor:
        """One step in place, of GD or, where `holder` says which worker has each filter, of LoFT. Returns f(X, W) before it, (n,)."""
        count, places, filters = self._shape
        product = (self._rows @ self.weights.T).view(count, places, filters)
        contributions = (product.relu() * self._signs).sum(1) / math.sqrt(filters)
        outputs = contributions.sum(1) / self._workers
        if holder is None:
            residual = (outputs - self._labels)[:, None].expand(count, filters)
        else:
            of_workers = torch.zeros(count, self._workers, dtype=torch.float64).index_add_(1, holder, contributions)
            residual = (of_workers - self._labels[:, None])[:, holder]
        pull = (product > 0) * self._signs * residual[:, None, :]
        self.weights -= self._rate * pull.view(count * places, filters).T @ self._rows
        return outputs


def left_hand_side(
    problem: Problem, descent: Descent, filters: int, workers: Sequence[int], start: int, deals: int, seed: int
) -> list[Cell]:
    """Both terms for every number of workers, from one initialisation, averaged over `deals` sequences of deals."""
    return [_cell(problem, descent, filters, count, start, deals, seed) for count in workers]


def _cell(problem: Problem, descent: Descent, filters: int, workers: int, start: int, deals: int, seed: int) -> Cell:
    gradient_descent = _Trajectory(problem, descent, filters, workers, start, seed)
    expected = [gradient_descent.step(None) for _ in range(descent.steps)]
    hands = torch.arange(filters) % workers
    ends, distances, outputs = [], [], []
    for deal in range(deals if workers > 1 else 1):  # one worker: nothing to deal
        loft = _Trajectory(problem, descent, filters, workers, start, seed)
        draw = seeds.generator(seed, "theory", filters, start, workers, deal)
        holder, together = None, 0.0
        for step in range(descent.steps):
            if workers > 1 and step % descent.local_iterations == 0:
                holder = hands[torch.randperm(filters, generator=draw)]
            together += float((loft.step(holder) - expected[step]).square().sum())
        ends.append(loft.weights)
        distances.append(float((loft.weights - gradient_descent.weights).square().sum()))
        outputs.append(descent.eta * together)
    spread = float(torch.stack(ends).var(0).sum()) if len(ends) > 1 else (0.0 if workers == 1 else math.nan)
    return Cell(filters, workers, start, float(np.mean(distances)), float(np.mean(outputs)), spread)


@dataclass(frozen=True)
class Slope:
    """How one term of the left-hand side falls with m: the exponent b of m^b."""

    workers: int
    term: str
    exponent: float
    half_width: float
    """Of its 95 % interval over the initialisations."""


def fit_slopes(cells: Sequence[Cell]) -> list[Slope]:
    """Least squares of ln(term) over ln(m), for each initialisation by itself.

    A term with an estimate that is not positive has no slope: leaving out that initialisation would favour the others.
    """
    slopes = []
    starts, sizes = sorted({cell.start for cell in cells}), sorted({cell.filters for cell in cells})
    for workers in sorted({cell.workers for cell in cells} - {1}):
        for term in TERMS:
            values = {(cell.start, cell.filters): getattr(cell, term) for cell in cells if cell.workers == workers}
            if len(sizes) > 1 and all(value > 0 for value in values.values()):
                x = np.log(sizes)
                exponents = [float(np.polyfit(x, np.log([values[start, size] for size in sizes]), 1)[0]) for start in starts]
                slopes.append(Slope(workers, term, *mean_interval(exponents)))
    return slopes
