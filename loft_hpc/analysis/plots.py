"""Plots, as PNG, PDF or SVG by the ending of their file's name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loft_hpc.analysis.distance import GroupDistance
from loft_hpc.analysis.statistics import NEAR, mean_interval
from loft_hpc.analysis.timing import Seconds
from loft_hpc.files import write_atomically

_STYLES = {"loft": ("#0072B2", "o"), "data-parallel": ("#D55E00", "s"), "gpipe": ("#009E73", "^")}
"""Colours that colour-blind eyes tell apart (Okabe and Ito), each with a marker of its own."""


_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""Without the moment of drawing, the same figures give the same file."""


class Cost(Protocol):
    """A point of the plot."""

    strategy: str
    workers: int
    delivered_bytes: int
    seconds_per_epoch: Seconds | None
    impossible: str


@contextmanager
def _figure(path: Path, rows: int, columns: int, size: tuple[float, float], **details: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """A figure of (rows, columns) axes, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **details)
    try:
        yield figure, axes
        drawn, format = BytesIO(), path.suffix[1:].lower()
        with matplotlib.rc_context({"svg.hashsalt": "loft-hpc"}):  # names of elements, drawn by chance otherwise
            figure.savefig(drawn, format=format, dpi=150, metadata=_UNDATED.get(format))
        write_atomically(path, drawn.getvalue())
    finally:
        pyplot.close(figure)


def _logarithmic(axes: Any, numbers: Sequence[int], label: str) -> None:
    """Both axes logarithmic, the horizontal one of base 2 with a tick at each of the numbers."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel(label)


def plot_costs(costs: Sequence[Cost], path: Path, title: str, cluster: str | None) -> None:
    """Bytes delivered over the training, and beside them seconds per epoch where a cluster is given, over the number of workers."""
    values = [("payload delivered to workers, whole training (GB)", lambda cost: cost.delivered_bytes / 1e9)]
    if cluster:
        name = cluster.replace("$", r"\$")  # no formula
        values.append((f"seconds per epoch, predicted for {name}", lambda cost: cost.seconds_per_epoch.total))
    possible = [cost for cost in costs if not cost.impossible]
    numbers = sorted({cost.workers for cost in costs})
    with _figure(path, 1, len(values), (12 if cluster else 6.5, 4.8)) as (figure, panels):
        for axes, (label, value) in zip(panels[0], values, strict=True):
            for strategy in dict.fromkeys(cost.strategy for cost in possible):
                points = [cost for cost in possible if cost.strategy == strategy]
                colour, marker = _STYLES[strategy]
                axes.plot(
                    [point.workers for point in points], [value(point) for point in points], color=colour, marker=marker, label=strategy
                )
            _logarithmic(axes, numbers, "workers")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title.replace("; ", "\n"), fontsize=10)


class Row(Protocol):
    """Distances of one snapshot."""

    epoch: float
    groups: list[GroupDistance]

    @property
    def mean_normalised(self) -> float: ...


class Stability(Protocol):
    """Where a run's rankings are stable."""

    epoch: float | None
    tolerance: float


class Course(Protocol):
    """A run's distances over its pretraining."""

    path: Path
    label: str
    rows: Sequence[Row]
    losses: Sequence[tuple[float, float]]
    stability: Stability | None
    moves: Sequence[tuple[float, float]]


def plot_distances(courses: Sequence[Course], path: Path, reference: str) -> None:
    """The poster's heat map of each run, layers by epochs, darker being closer; under it the mean distance, and the training loss.

    Distances are shown from 0 (the same ranking) to 1 (a random one), whatever the run. Beside the mean stands what the rule of
    --stop-when-stable compares, with its tolerance and the epoch at which it ends the training.
    """
    heights = [2.2, 1.6, 1.0]
    width = 5.2 if len(courses) > 1 else 7.5
    size = (width * len(courses), 2.0 * sum(heights))
    with _figure(path, len(heights), len(courses), size, height_ratios=heights, sharex="col", sharey="row") as (figure, panels):
        for course, (heat, mean, loss) in zip(courses, panels.T, strict=True):
            epochs = np.array([row.epoch for row in course.rows])
            values = np.array([[group.normalised for group in row.groups] for row in course.rows]).T
            names = [group.group for group in course.rows[0].groups]
            mesh = heat.pcolormesh(_edges(epochs), np.arange(len(names) + 1), values, cmap="magma", vmin=0, vmax=1)
            heat.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
            heat.set_ylim(len(names), 0)
            heat.set_title(course.label)
            mean.plot(epochs, [row.mean_normalised for row in course.rows], "o-", color="#0072B2", label=_reference_name(reference))
            if course.moves and reference != "previous":
                mean.plot(*zip(*course.moves, strict=True), "s--", color="#D55E00", label="the snapshot before (filters in view)")
            mean.set_ylim(0, 1.05)
            mean.grid(alpha=0.3)
            loss.plot(*zip(*course.losses, strict=True), color="black", marker=".")
            loss.set_xlabel("epochs of pretraining")
            loss.grid(alpha=0.3)
            stable = course.stability
            if stable is not None:
                mean.axhline(stable.tolerance, color="0.4", linestyle=":", label=f"tolerance {stable.tolerance:g}")
                for axes in (heat, mean, loss) if stable.epoch is not None else ():
                    axes.axvline(stable.epoch, color="#009E73", linewidth=1.5, label="rule ends the training")
            mean.legend(fontsize=7, title="distance to", title_fontsize=7)
        panels[1][0].set_ylabel("mean over layers")
        panels[2][0].set_ylabel("training loss")
        figure.colorbar(mesh, ax=list(panels[0]), label="filter distance / that of a random ranking", fraction=0.05)
        figure.suptitle(f"Filter distance of each snapshot to {_reference_name(reference)} (darker: closer)", fontsize=11)


class Point(Protocol):
    """A retrained ticket of a snapshot."""

    run: Path
    label: str
    snapshot: str
    epoch: float
    ratio: float
    """What was asked for."""
    accuracy: float
    dense_accuracy: float | None

    @property
    def removed(self) -> str:
        """Shares in words, that are removed and that were asked for."""


def plot_sweep(points: Sequence[Point], path: Path) -> None:
    """Accuracy after retraining over the snapshot's epoch: a curve for each label and pruning ratio, and one for the dense network that was
    retrained from the same snapshots. A dotted line lies NEAR points below the last ticket: earlier ones above it are as good.

    Several runs of one label are averaged; three and more with the 95 % interval of their mean (Student).
    """
    labels = list(dict.fromkeys(point.label for point in points))
    ratios = sorted({point.ratio for point in points}, reverse=True)
    with _figure(path, 1, len(ratios), (1.5 + 5.2 * len(ratios), 4.6), sharey=True) as (_, panels):
        for axes, ratio in zip(panels[0], ratios, strict=True):
            for label, (colour, marker) in zip(labels, _cycle(), strict=False):
                mine = [point for point in points if point.label == label and point.ratio == ratio]
                if not mine:
                    continue
                snapshots = list(dict.fromkeys(point.snapshot for point in mine))
                groups = [[point for point in mine if point.snapshot == snapshot] for snapshot in snapshots]
                epochs = [float(np.mean([point.epoch for point in group])) for group in groups]
                means, halves = zip(*(_interval([100 * point.accuracy for point in group]) for group in groups), strict=True)
                axes.errorbar(epochs, means, yerr=halves, color=colour, marker=marker, capsize=3, label=f"{label}, ticket retrained")
                if len(groups) > 1:
                    axes.axhline(means[-1] - NEAR, color=colour, linestyle=":", linewidth=1, label=f"{NEAR:g} point below the last ticket")
                dense = [[point.dense_accuracy for point in group] for group in groups]
                if all(accuracy is not None for accuracies in dense for accuracy in accuracies):
                    means = [100 * float(np.mean(accuracies)) for accuracies in dense]
                    axes.plot(epochs, means, color=colour, linestyle="--", linewidth=1, label=f"{label}, dense network retrained")
            axes.set_title(f"{next(point.removed for point in points if point.ratio == ratio)} pruned")
            axes.set_xlabel("epoch of pretraining whose ticket is retrained")
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("test accuracy (%)")
        panels[0][0].legend(fontsize=8)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """As `mean_interval`; that of two values would dwarf the plot."""
    mean, half = mean_interval(values)
    return mean, half if len(values) > 2 else float("nan")


class Contender(Protocol):
    """Retrained tickets of one method and ratio."""

    label: str
    kind: str
    budget: str
    density: float
    mean: float
    half_width: float
    accuracies: Sequence[float]


def plot_tickets(contenders: Sequence[Contender], path: Path) -> None:
    """Accuracy after retraining over density: a panel for each budget, for others cannot be compared; in it a curve for each method
    and a line for the dense network; intervals where there are three runs."""
    lines = {"filter": "-", "layer": ":", "weight": "--"}
    budgets = list(dict.fromkeys(one.budget for one in contenders if one.kind != "dense"))
    budgets = budgets or list(dict.fromkeys(one.budget for one in contenders))
    colours = dict(zip(dict.fromkeys(one.label for one in contenders if one.kind != "dense"), _cycle(), strict=False))
    with _figure(path, len(budgets), 1, (9.5, 0.8 + 4.8 * len(budgets)), sharex=True) as (_, panels):
        for (axes,), budget in zip(panels, budgets, strict=True):
            here = [one for one in contenders if one.budget == budget]
            for label, (colour, marker) in colours.items():
                mine = sorted((one for one in here if one.label == label), key=lambda one: one.density)
                if not mine:
                    continue
                halves = [100 * one.half_width if len(one.accuracies) > 2 else float("nan") for one in mine]
                axes.errorbar(
                    [100 * one.density for one in mine], [100 * one.mean for one in mine], yerr=halves, color=colour, marker=marker,
                    capsize=3, linestyle=lines.get(mine[0].kind, "-"), linewidth=1.2, markersize=5, label=label,
                )  # fmt: skip
            dense = [one for one in here if one.kind == "dense"]
            for one, style in zip(dense, ("-.", (0, (1, 1)), (0, (5, 5))) * len(dense), strict=False):
                axes.axhline(100 * one.mean, color="0.4", linestyle=style, linewidth=1, label=one.label)
            axes.set_title(budget, fontsize=9)
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= mark <= high]
            if len(marks) < 2:  # densities so near to one another lie between the round ones
                marks = sorted({float(f"{100 * one.density:.3g}") for one in here})
            axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
            axes.minorticks_off()
            axes.set_ylabel("test accuracy (%)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        panels[-1][0].set_xlabel("density: parameters that stay (%)")


class Cell(Protocol):
    """The left-hand side of Theorem 1 for one initialisation."""

    filters: int
    workers: int
    spread: float
    drift: float
    outputs: float


def plot_theory(cells: Sequence[Cell], path: Path) -> None:
    """The terms of the left-hand side over m, for every S above 1, with 95 % intervals, and m^(-1/4) for comparison."""
    terms = {
        "spread": "weights, spread over the deals",
        "drift": "weights, drift of their mean from GD's",
        "outputs": "outputs, $\\eta\\,\\Sigma_t\\,||f(X, W_t) - f(X, \\hat W_t)||^2$",
    }
    filters = sorted({cell.filters for cell in cells})
    with _figure(path, 1, len(terms), (15.5, 4.8)) as (_, panels):
        for axes, (term, title) in zip(panels[0], terms.items(), strict=True):
            highest = 0.0
            for workers, (colour, marker) in zip(sorted({cell.workers for cell in cells} - {1}), _cycle(), strict=False):
                values = [[getattr(cell, term) for cell in cells if (cell.workers, cell.filters) == (workers, m)] for m in filters]
                means, halves = zip(*map(mean_interval, values), strict=True)
                axes.errorbar(filters, means, yerr=halves, color=colour, marker=marker, capsize=3, label=f"S = {workers}")
                highest = max(highest, means[0])
            if highest and term != "spread":
                reference = [highest * (m / filters[0]) ** -0.25 for m in filters]
                axes.plot(filters, reference, color="grey", linestyle=":", label="$m^{-1/4}$")
            _logarithmic(axes, filters, "hidden filters m")
            axes.set_title(title)
            axes.grid(alpha=0.3)
        panels[0][1].legend()


def _edges(centres: np.ndarray) -> np.ndarray:
    """The borders of cells around the snapshots' epochs, half way between them."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _reference_name(reference: str) -> str:
    return {"final": "the final network", "previous": "the snapshot before", "init": "the initialisation"}.get(reference, reference)


def _cycle() -> list[tuple[str, str]]:
    """(colour, marker) for curves that stand for no strategy."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    return list(zip(colours * 2, "os^Dv<>" + "sDo^<v>", strict=True))
