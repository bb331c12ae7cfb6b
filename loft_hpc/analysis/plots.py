"""Plots as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from loft_hpc.analysis.timing import Seconds
from loft_hpc.errors import LoftError

_STYLES = {"loft": ("#0072B2", "o"), "data-parallel": ("#D55E00", "s"), "gpipe": ("#009E73", "^")}
"""Colours that colour-blind eyes tell apart (Okabe and Ito), each with a marker of its own."""


class Cost(Protocol):
    """A point of the plot."""

    strategy: str
    workers: int
    delivered_bytes: int
    seconds_per_epoch: Seconds | None
    impossible: str


def plot_costs(costs: Sequence[Cost], path: Path, title: str, cluster: str | None) -> None:
    """Bytes delivered over the training, and beside them seconds per epoch where a cluster is given, over the number of workers."""
    if path.suffix.lower() != ".png":
        raise LoftError(f"--plot {path} must end in .png", usage=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2 if cluster else 1, figsize=(12 if cluster else 6.5, 4.8), squeeze=False, layout="constrained")
    values = [("payload delivered to workers, whole training (GB)", lambda cost: cost.delivered_bytes / 1e9)]
    if cluster:
        values.append((f"seconds per epoch, predicted for {cluster}", lambda cost: cost.seconds_per_epoch.total))
    possible = [cost for cost in costs if not cost.impossible]
    numbers = sorted({cost.workers for cost in costs})
    for axes, (label, value) in zip(panels[0], values, strict=True):
        for strategy in dict.fromkeys(cost.strategy for cost in possible):
            points = [cost for cost in possible if cost.strategy == strategy]
            colour, marker = _STYLES[strategy]
            axes.plot([point.workers for point in points], [value(point) for point in points], color=colour, marker=marker, label=strategy)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel("workers")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title.replace("; ", "\n"), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
