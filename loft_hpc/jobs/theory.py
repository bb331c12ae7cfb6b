"""`loft theory`: the grid of the numerical check, shared out over the ranks, and what may be said of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from loft_hpc.analysis.statistics import mean_interval
from loft_hpc.analysis.theory import TERMS, Cell, Descent, Problem, Slope, cut_into_patches, fit_slopes, left_hand_side
from loft_hpc.comm.world import World
from loft_hpc.data.embedded import digits
from loft_hpc.errors import LoftError
from loft_hpc.training.settings import MAX_SEED, MAX_STEPS, refuse_outside

__all__ = ["TERMS", "Theory", "TheorySettings", "check_theorem"]

MAX_FILTERS, MAX_STARTS = 1 << 24, 100_000
BOUND_EXPONENT = -0.25
"""Of m, in the first term of the theorem's right-hand side."""


@dataclass(frozen=True)
class TheorySettings:
    """The grid, and the trajectories in it."""

    filters: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    workers: tuple[int, ...] = (1, 2, 4, 8)
    images: int = 32
    patch_size: int = 4
    steps: int = 200
    eta: float | None = None
    """Step size; None for 1 / (2 lambda_max), a quarter of the largest at which gradient descent on the kernel is stable."""
    local_iterations: int = 1
    kappa: float = 1.0
    starts: int = 5
    """Initialisations, for the error bars."""
    deals: int = 4
    """Sequences of deals that each initialisation is averaged over."""
    seed: int = 0

    def __post_init__(self):
        for name in ("filters", "workers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)) or min(getattr(self, name)) < 1:
                raise LoftError(f"--{name} gives a number twice, or one below 1", usage=True)
        for filters, workers in product(self.filters, self.workers):
            if filters % workers:
                raise LoftError(f"{workers} workers cannot share {filters} filters equally: give multiples as --filters", usage=True)
        if min(self.images, self.steps, self.local_iterations, self.deals) < 1 or self.images < 2 or self.starts < 1:
            raise LoftError("--images (2 or more), --steps, --local-iterations, --starts and --deals must be at least 1", usage=True)
        if self.images > 1437:
            raise LoftError(f"--images {self.images}: digits has 1437 training images", usage=True)
        for name in ("kappa", "eta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LoftError(f"--{name} {value} must be a positive number", usage=True)
        if self.patch_size not in (1, 2, 4, 8):
            raise LoftError(f"--patch-size {self.patch_size} does not divide the 8x8 pixels of a digit: give 1, 2, 4 or 8", usage=True)
        refuse_outside(
            self, seed=(0, MAX_SEED), steps=(1, MAX_STEPS), local_iterations=(1, MAX_STEPS), starts=(1, MAX_STARTS), deals=(1, MAX_STARTS)
        )
        if max(self.filters) > MAX_FILTERS:
            raise LoftError(f"--filters {max(self.filters)} must be at most {MAX_FILTERS:,}", usage=True)


@dataclass(frozen=True)
class Theory:
    """What was found."""

    lambda_min: float
    lambda_max: float
    eta: float
    theorem_eta: float
    """lambda_0 / n^2, the order of step size that the theorem asks for."""
    cells: list[Cell]
    slopes: list[Slope]
    remarks: list[str]

    def mean(self, filters: int, workers: int, term: str) -> tuple[float, float]:
        """(mean, half of the 95 % interval) over the initialisations."""
        return mean_interval([getattr(cell, term) for cell in self.cells if (cell.filters, cell.workers) == (filters, workers)])


def check_theorem(settings: TheorySettings, world: World) -> Theory:
    """Compute the grid, dealt to the ranks by its cost. Collective; the figures do not depend on the number of ranks."""
    torch.set_num_threads(1)
    problem = _problem(settings)
    lowest, highest = problem.eigenvalues
    eta = settings.eta or 0.5 / highest
    descent = Descent(eta, settings.steps, settings.local_iterations, settings.kappa)
    tasks = sorted(((filters, start) for filters in settings.filters for start in range(settings.starts)), reverse=True)
    mine = []
    for filters, start in _share(tasks, world):
        mine += left_hand_side(problem, descent, filters, settings.workers, start, settings.deals, settings.seed)
    cells = sorted((cell for part in world.gather_objects(mine) for cell in part), key=lambda c: (c.filters, c.workers, c.start))
    if not all(math.isfinite(cell.total) for cell in cells):
        raise LoftError(f"the trajectories diverge at a step size of {eta:g}: give a smaller --eta")
    slopes = fit_slopes(cells)
    found = Theory(lowest, highest, eta, lowest / settings.images**2, cells, slopes, [])
    return Theory(**{**vars(found), "remarks": _remarks(found, settings)})


def _problem(settings: TheorySettings) -> Problem:
    """The first training images of digits that every evaluation also looks at; 0 to 4 against 5 to 9."""
    ((images, labels),) = digits(torch.device("cpu")).calibration_batches(1, settings.images, 0, 1)
    return cut_into_patches(images, torch.where(labels < 5, 1.0, -1.0), settings.patch_size)


def _share(tasks: Sequence[tuple[int, int]], world: World) -> list[tuple[int, int]]:
    """This rank's tasks: each, from the most costly on, goes to the rank that has least to do."""
    loads, shares = [0] * world.size, [[] for _ in range(world.size)]
    for task in tasks:
        rank = loads.index(min(loads))
        loads[rank] += task[0]
        shares[rank].append(task)
    return shares[world.rank]


def _remarks(found: Theory, settings: TheorySettings) -> list[str]:
    """What agrees with the bound, what does not, and what this cannot show, in plain words."""
    remarks = []
    if 1 in settings.workers:
        exact = all(cell.total == 0 for cell in found.cells if cell.workers == 1)
        remarks.append("S = 1: LoFT and gradient descent are the same to the last bit." if exact else "S = 1: THE TWO DIFFER, a defect.")
    subjects = {
        "total": "The left-hand side",
        "outputs": "Its term of the outputs",
        "drift": "The drift of the mean weights from gradient descent's",
        "spread": "The spread of the weights over the deals",
    }
    several, sizes = sorted(set(settings.workers) - {1}), sorted(settings.filters)
    large, upper = sizes[-1], sizes[len(sizes) // 2 :]
    of_upper = fit_slopes([cell for cell in found.cells if cell.filters in upper])
    for term, subject in subjects.items():
        judged = judge_slopes([slope for slope in found.slopes if slope.term == term])
        if judged:
            remarks.append(f"{subject} {judged}.")
        # what is a sum of something that falls and something that does not is no power of m: its upper end says where it goes
        judged = judge_slopes([slope for slope in of_upper if slope.term == term]) if term in ("total", "spread") else ""
        if judged:
            remarks.append(f"Over the upper half of the grid alone, m from {upper[0]} to {large}, it {judged}.")
    if any(slope.term == "spread" for slope in found.slopes):
        remarks.append(
            "The bound allows what does not fall with m: its second term does not depend on m. Its first term falls as m^(-1/4); what "
            "falls faster is within the bound, which then is not tight in m here. A spread that went on growing with m would contradict it."
        )
    if len(several) > 1 and settings.deals > 1:
        few, many = several[0], several[-1]
        measured = found.mean(large, many, "spread")[0] / found.mean(large, few, "spread")[0]
        allowed = _second_term(many) / _second_term(few)
        verdict = "no contradiction" if measured <= allowed else "which the second term alone would NOT allow"
        remarks.append(
            f"From S = {few} to S = {many} the spread changes by a factor {measured:.3f} at m = {large}, the bound's second term, (1 - xi) / S "
            f"with xi = 1/S, by {allowed:.3f}: {verdict}. As f is scaled here, one expects about (1 - 1/S) / S^3, a factor "
            f"{_second_term(many) / many**2 / (_second_term(few) / few**2):.3f}, so this could hardly have come out otherwise."
        )
    remarks.append(
        "What this cannot show: the bound's constants (theta and the O are not given), so no inequality is tested, only trends in m and S. "
        f"The step size is {found.eta / found.theorem_eta:.0f} times lambda_0 / n^2, the order that the theorem asks for; at that, hardly "
        f"anything would move in {settings.steps} steps. One small data set of {settings.images} digits; f is scaled as defined here, where "
        "the poster leaves the scale open."
    )
    return remarks


def judge_slopes(slopes: Sequence[Slope]) -> str:
    """What may be said of exponents with their intervals; empty where there are none, or no intervals."""
    verdicts: dict[str, list[int]] = {}
    for slope in slopes:
        low, high = slope.exponent - slope.half_width, slope.exponent + slope.half_width
        if not math.isnan(low):
            verdict = (
                "falls with m, faster than m^(-1/4)" if high < BOUND_EXPONENT
                else "falls with m" if high < 0
                else "GROWS with m" if low > 0
                else "does not change with m as far as this can tell"
            )  # fmt: skip
            verdicts.setdefault(verdict, []).append(slope.workers)
    powers = ", ".join(f"{slope.exponent:+.2f} +- {slope.half_width:.2f} (S = {slope.workers})" for slope in slopes)
    said = "; ".join(f"{verdict} for S = {', '.join(map(str, workers))}" for verdict, workers in verdicts.items())
    return f"goes as m to the power {powers}: it {said}" if verdicts else ""


def _second_term(workers: int) -> float:
    return (1 - 1 / workers) / workers
