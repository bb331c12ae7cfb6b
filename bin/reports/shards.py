"""Replicated or sharded images under LoFT: which makes the better ticket of the same number of images?

Replicated (the poster's, the default): every worker sees all images in an epoch, in an order of its own. Sharded (--shard-data): an
epoch is split over the workers. With 4 workers, E epochs of the one and 4 E of the other are the same images, steps, rounds and bytes.
Each pair has one seed; its 80 % tickets are retrained by one recipe. Runs that are done are kept and used again.
"""

from pathlib import Path

import click

from page import table
from trainings import loft, train, with_interval

RANKS = 4
RECIPES = {
    "digits": (("--preset", "digits", "--batch-size", 32), 2, ("--epochs", 5)),
    "textures": (("--preset", "textures"), 3, ("--epochs", 8, "--lr", 0.1)),
    "fashion-mnist": (
        ("--preset", "fashion-mnist", "--widen", 0.5, "--data-dir", "/usr/share/datasets/fashion-mnist"),
        1,
        ("--epochs", 1, "--lr", 0.1, "--batch-size", 64, "--warmup", "100it"),
    ),
}
"""By data set: options of pretraining, epochs of a worker that sees all images, options of retraining."""
KINDS = {"replicated": ("--no-shard-data", 1), "sharded": ("--shard-data", RANKS)}


@click.command(help=__doc__)
@click.option("--dataset", "datasets", type=click.Choice(list(RECIPES)), multiple=True, default=list(RECIPES), show_default=True)
@click.option("--seeds", type=int, multiple=True, default=(1, 2, 3, 4, 5), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/shards"), show_default=True)
def main(datasets: tuple[str, ...], seeds: tuple[int, ...], folder: Path) -> None:
    rows = []
    for dataset in datasets:
        pretraining, epochs, retraining = RECIPES[dataset]
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for seed in seeds:
            for kind, (option, factor) in KINDS.items():
                run = folder / dataset / f"{kind}-{seed}"
                quiet = ("--evaluate-every", 1000, "--snapshot-every", "0", "--seed", seed)
                merged = train(run, "pretrain", *pretraining, option, "--epochs", factor * epochs, *quiet, ranks=RANKS)
                ticket = run / "tickets" / "magnitude-l2-0.8"
                if not ticket.exists():
                    loft("prune", run, "--ratio", 0.8)
                again = train(run.with_name(f"{run.name}-ticket"), "retrain", ticket, *retraining, *quiet[:2], "--seed", seed, ranks=RANKS)
                found[kind].append((100 * merged["accuracy"], 100 * again["accuracy"]))
                click.echo(f"{dataset}, seed {seed}, {kind}: {found[kind][-1][0]:.2f} %, its ticket {found[kind][-1][1]:.2f} %")
        for place, what in enumerate(("merged network", "80 % ticket, retrained")):
            values = {kind: [pair[place] for pair in pairs] for kind, pairs in found.items()}
            differences = [one - other for one, other in zip(values["sharded"], values["replicated"], strict=True)]
            cells = [with_interval(values[kind]) for kind in KINDS]
            rows.append([dataset, what, str(len(seeds)), *cells, with_interval(differences, sign=True)])
    print(table(["data", "test accuracy, %", "seeds", *KINDS, "sharded - replicated, points"], rows))


if __name__ == "__main__":
    main()
