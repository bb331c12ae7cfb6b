"""Does it cost anything that rankings must have left the initial ones before they count as stable? And what does it prevent?

LoFT on 4 ranks, on seeds that no other report of accuracies uses. For each training, where `--stop-when-stable` ends it with and without
that condition, read from its recorded scores; and the same for a network that learns nothing (a learning rate of 1e-6).
"""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import click

from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.jobs.stops import stopping_step
from loft_hpc.runs.run import Run

from page import table
from trainings import train

RECIPES: dict[str, tuple] = {
    "textures": ("--preset", "textures"),
    "digits": ("--preset", "digits"),
    "fashion-mnist": (
        "--preset", "fashion-mnist", "--widen", 0.5, "--data-dir", "/usr/share/datasets/fashion-mnist", "--epochs", 1,
        "--snapshot-every", "80it",
    ),
}  # fmt: skip


def ends(run: Path, conditional: bool) -> str:
    """Share of the training after which it would have ended, in per cent; `never` where it would not."""
    opened = Run.open(run)
    with patch("loft_hpc.filterwise.emergence.LEFT", 0.1 if conditional else -1.0):
        step = stopping_step(opened, Stopping())
    return "never" if step is None else f"{100 * step / opened.description['total_steps']:.0f} %"


@click.command(help=__doc__)
@click.option("--dataset", "datasets", type=click.Choice(list(RECIPES)), multiple=True, default=list(RECIPES), show_default=True)
@click.option("--seeds", type=int, multiple=True, default=(101, 102, 103, 104), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/leaving"), show_default=True)
def main(datasets: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    rows = []
    for dataset in datasets:
        for name, more, own in (("", (), seeds), (", lr 1e-6", ("--lr", 1e-6), seeds[:1])):
            runs = [folder / f"{dataset}{'-idle' * bool(more)}-{seed}" for seed in own]
            for run, seed in zip(runs, own, strict=True):
                train(run, "pretrain", *RECIPES[dataset], "--no-snapshot-tensors", "--evaluate-every", 1000, *more, "--seed", seed, ranks=4)
            found = [", ".join(ends(run, conditional) for run in runs) for conditional in (False, True)]
            rows.append([dataset + name, ", ".join(map(str, own)), *found])
            click.echo(" | ".join(rows[-1]))
    print(table(["data", "seeds", "ends after, without the condition", "with it"], rows))


if __name__ == "__main__":
    main()
