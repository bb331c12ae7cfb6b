"""How tolerance and patience of --stop-when-stable were chosen: on seeds that no other report uses.

Pretrains with LoFT on 4 ranks, draws the 80 % ticket of every snapshot, retrains them all, and looks where each setting would have
stopped. A setting is good if its tickets are, in the mean over the seeds, at most half a point below those of the whole pretraining, on
both data sets. Chosen is the good one with the earliest stops whose neighbours are good too: the next larger tolerance, and a patience
one less.
"""

import statistics
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import click

from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.jobs.stops import stopping_step
from loft_hpc.runs.run import Run
from loft_hpc.runs.snapshots import point_of

from trainings import side_by_side, sweep, train

DATASETS = ("textures", "digits")
TOLERANCES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2)
PATIENCES = (1, 2, 3)
LOSS_ALLOWED = 0.5


def _name(tolerance: float, patience: int) -> str:
    return f"filter-distance, {tolerance:g}, {patience}"


SETTINGS = {_name(*pair): Stopping(tolerance=pair[0], patience=pair[1]) for pair in product(TOLERANCES, PATIENCES)}
SETTINGS |= {
    f"mask-distance, {tolerance:g}, 4": Stopping(stability="mask-distance", tolerance=tolerance) for tolerance in (0.05, 0.1, 0.15, 0.2)
}


def stops_at(run: Path, setting: Stopping) -> str:
    """The snapshot at which the training would have stopped, as commands name it; the last one if it never would."""
    opened = Run.open(run)
    names, steps = opened.snapshots.names(), opened.snapshots.score_steps()
    step = stopping_step(opened, setting)
    return point_of(names[-1] if step is None else names[steps.index(step)])


@click.command(help=__doc__)
@click.option("--seeds", type=int, multiple=True, default=(101, 102, 103, 104), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/stopping"), show_default=True)
def main(seeds: tuple[int, ...], folder: Path) -> None:
    runs = {dataset: [folder / f"{dataset}-{seed}" for seed in seeds] for dataset in DATASETS}
    for dataset, paths in runs.items():
        for seed, path in zip(seeds, paths, strict=True):
            train(path, "pretrain", "--preset", dataset, "--evaluate-every", "1000", "--seed", seed, ranks=4)
    accuracies = {}
    for points in side_by_side(
        [partial(sweep, path, "--preset", dataset, "--ratio", "0.8") for dataset, paths in runs.items() for path in paths]
    ):
        accuracies |= {(Path(point["run"]), point["snapshot"]): 100 * point["accuracy"] for point in points}
    rows = []
    for name, setting in SETTINGS.items():
        epochs, losses = [], []
        for paths in runs.values():
            stops = [stops_at(path, setting) for path in paths]
            last = [point_of(Run.open(path).snapshots.names()[-1]) for path in paths]
            epochs.append(statistics.mean(int(stop.split(":")[1]) for stop in stops))
            losses.append(
                statistics.mean(accuracies[path, stop] - accuracies[path, end] for path, stop, end in zip(paths, stops, last, strict=True))
            )
        rows.append((name, epochs, losses))
    good = {row[0]: sum(row[1]) for row in rows if min(row[2]) >= -LOSS_ALLOWED}
    safe = [
        _name(tolerance, patience)
        for (tolerance, larger), patience in product(pairwise(TOLERANCES), PATIENCES[1:])
        if {_name(tolerance, patience), _name(larger, patience), _name(tolerance, patience - 1)} <= good.keys()
    ]
    chosen = min(safe, key=good.__getitem__) if safe else ""
    click.echo("| rule, tolerance, patience | " + " | ".join(f"{d}: epochs | points against 10 epochs" for d in DATASETS) + " |")
    click.echo("|---" * 5 + "|")
    for name, epochs, losses in rows:
        cells = " | ".join(f"{epoch:.1f} | {loss:+.2f}" for epoch, loss in zip(epochs, losses, strict=True))
        mark = "**" if name == chosen else ""
        click.echo(f"| {mark}{name}{mark} | {cells} |")


if __name__ == "__main__":
    main()
