"""What a cheaper exchange costs in accuracy: LoFT's variants trained from the same seeds, their tickets retrained, and compared in pairs.

Every run is a real job of 4 MPI ranks. Runs that are done are kept and used again, so the report can be interrupted, or asked for more
seeds. A difference is taken seed by seed against the poster's way (its partition, float32); its interval is Student's.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import click

from trainings import loft, train, with_interval

RANKS = 4


@dataclass(frozen=True)
class Recipe:
    """How networks are trained on one data set, the same for every variant."""

    network: tuple[str, ...]
    pretraining: tuple[str, ...]
    retraining: tuple[str, ...]


RECIPES = {
    "digits": Recipe(
        ("--model", "resnet20", "--widen", "4", "--dataset", "digits"),
        ("--lr", "0.1", "--batch-size", "32", "--epochs", "10", "--local-iterations", "8"),
        ("--epochs", "10"),
    ),
    "textures": Recipe(
        ("--model", "resnet20", "--widen", "2", "--dataset", "textures", "--image-size", "12"),
        ("--lr", "0.1", "--batch-size", "32", "--epochs", "6", "--local-iterations", "8"),
        ("--epochs", "20", "--lr", "0.1"),
    ),
}
BASELINE = "paper, float32"
VARIANTS = {
    BASELINE: (),
    "paper, bfloat16": ("--transport-dtype", "bfloat16"),
    "paper, bfloat16, averaged every 4": ("--transport-dtype", "bfloat16", "--average-every", "4"),
    "all-blocks, float32": ("--partition", "all-blocks"),
}


class Study:
    """Runs what is not there yet, under one folder."""

    def __init__(self, folder: Path, ratios: tuple[str, ...]):
        self._folder, self._ratios = folder, ratios

    def accuracies(self, dataset: str, variant: str, seed: int) -> dict[str, float]:
        """Test accuracy in per cent of the merged network, and of its tickets after retraining."""
        recipe = RECIPES[dataset]
        folder = self._folder / dataset / variant.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
        quiet = ("--evaluate-every", "1000", "--snapshot-every", "0", "--seed", str(seed))
        pretrained = folder / "pretrain"
        pretraining = ("pretrain", *recipe.network, *recipe.pretraining, "--exchange", "alltoall", *VARIANTS[variant], *quiet)
        found = {"merged network": 100 * train(pretrained, *pretraining, ranks=RANKS)["accuracy"]}
        for ratio in self._ratios:
            name = f"magnitude-l2-global-{ratio}"
            ticket = pretrained / "tickets" / name
            if not (ticket / "ticket.json").exists():
                loft("prune", pretrained, "--ratio", ratio, "--scope", "global")
            retrain = ("retrain", str(ticket), *recipe.retraining, *quiet)
            retrained = train(folder / f"retrain-{ratio}", *retrain, ranks=RANKS)
            found[f"{100 * float(ratio):g} % pruned, retrained"] = 100 * retrained["accuracy"]
        return found


@click.command(help=__doc__)
@click.option("--dataset", "datasets", multiple=True, type=click.Choice(list(RECIPES)), default=tuple(RECIPES), show_default=True)
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True, help="Seeds 1 to this.")
@click.option("--ratio", "ratios", multiple=True, default=("0.8",), show_default=True, help="Pruning ratios of the tickets.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/accuracy"), show_default=True)
def main(datasets: tuple[str, ...], seeds: int, ratios: tuple[str, ...], folder: Path) -> None:
    study = Study(folder, ratios)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(1, seeds + 1):  # seed by seed, so that an interrupted study has whole pairs
        for dataset in datasets:
            for variant in VARIANTS:
                results.setdefault((dataset, variant), []).append(study.accuracies(dataset, variant, seed))
                click.echo(f"{dataset}, {variant}, seed {seed}: {results[dataset, variant][-1]}", err=True)
    click.echo("| data | what | " + " | ".join(VARIANTS) + " |\n|---|---|" + "---|" * len(VARIANTS))
    for dataset in datasets:
        base = results[dataset, BASELINE]
        for what in base[0]:
            cells = []
            for variant in VARIANTS:
                values = [found[what] for found in results[dataset, variant]]
                if variant == BASELINE:
                    cells.append(f"{statistics.mean(values):.2f} %")
                else:
                    cells.append(with_interval([value - other[what] for value, other in zip(values, base, strict=True)], sign=True))
            click.echo(f"| {dataset} | {what} | " + " | ".join(cells) + " |")
    click.echo(f"\nFirst column: mean accuracy over {seeds} seeds. Others: mean paired difference in points, 95 % interval.")


if __name__ == "__main__":
    main()
