"""Every ticket finder on textures: three densities, three seeds, one recipe of retraining.

Runs real commands, single ones side by side on as many cores as there are (LoFT on 4 ranks). What is done is kept under --folder and used
again. With --into the page's tables and its figure are replaced by the new ones.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loft_hpc.jsontext import to_json_text

from page import renew, table
from trainings import loft, side_by_side, train

SEEDS = (1, 2, 3)
RATIOS = ("0.5", "0.8", "0.95")
NETWORK = ("--model", "resnet20", "--dataset", "textures", "--image-size", 12)
RECIPE = ("--epochs", 8, "--lr", 0.1, "--batch-size", 64, "--evaluate-every", 100, "--checkpoint-every", "0")
WORKERS = 4
FINDERS: dict[str, tuple[str, ...]] = {
    "random": ("--method", "random"),
    "magnitude": ("--method", "magnitude"),
    "bn-scale": ("--method", "bn-scale", "--floor", "0"),
    "early-bird": ("--method", "early-bird", "--floor", "0"),
    "loft": ("--method", "loft"),
    "layers-grasp": ("--method", "layers"),
    "layers-kl": ("--method", "layers", "--criterion", "kl"),
    "random-weights": ("--method", "random", "--unit", "weights", "--profile", "smart-ratio", "--at", "init"),
    "magnitude-weights": ("--method", "magnitude", "--unit", "weights", "--scope", "global"),
    "imp": ("--method", "imp", "--level-ratio", "0.5", "--rewind-to", "1ep"),
    "edge-popup": ("--method", "edge-popup"),
    "gem-miner": ("--method", "gem-miner"),
}


class Comparison:
    """The runs of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.missing: list[str] = []

    def dense(self, seed: int) -> Path:
        return self.folder / f"dense-{seed}"

    def source(self, finder: str, seed: int) -> Path:
        return self.folder / f"loft-{seed}" if finder == "loft" else self.dense(seed)

    def pretrain(self) -> None:
        # with a snapshot after every epoch: Early-Bird looks at them, and imp rewinds to the first
        side_by_side([
            lambda seed=seed: train(self.dense(seed), "pretrain", "--strategy", "data-parallel", *NETWORK, *RECIPE, "--seed", seed, threads=1)
            for seed in SEEDS
        ])  # fmt: skip
        for seed in SEEDS:
            command = ("pretrain", "--strategy", "loft", "--local-iterations", 8, *NETWORK, *RECIPE, "--seed", seed)
            train(self.source("loft", seed), *command, ranks=WORKERS)

    def find(self) -> None:
        """Tickets of all finders; searches take longest and begin first."""
        work = [(finder, seed) for finder in reversed(FINDERS) for seed in SEEDS]
        side_by_side([lambda finder=finder, seed=seed: self._find(finder, seed) for finder, seed in work])

    def _find(self, finder: str, seed: int) -> None:
        options = (*FINDERS[finder], *(("--seed", seed) if finder.startswith(("random", "gem", "edge")) else ()))
        for ratio in RATIOS:
            name = f"{finder}-{ratio}"
            if self.ticket(finder, seed, ratio).exists():
                continue
            try:
                loft("prune", self.source(finder, seed), *options, "--ratio", ratio, *self._named(finder, name), threads=1)
            except SystemExit as problem:
                if "do not stand still" not in str(problem):
                    raise
                self.missing.append(f"{finder} at {ratio}, seed {seed}")

    @staticmethod
    def _named(finder: str, name: str) -> tuple[str, ...]:
        # a search lies under its ticket's name; imp's levels must not, for all ratios share them
        return () if finder == "imp" else ("--name", name)

    def ticket(self, finder: str, seed: int, ratio: str) -> Path:
        name = f"imp-1ep-by0.5-{ratio}" if finder == "imp" else f"{finder}-{ratio}"
        return self.source(finder, seed) / "tickets" / name

    def retrained(self, finder: str, seed: int, ratio: str) -> Path:
        return self.folder / "retrained" / f"{finder}-{ratio}-{seed}"

    def retrain(self) -> None:
        work = [(finder, seed, ratio) for finder in FINDERS for ratio in RATIOS for seed in SEEDS]
        there = [case for case in work if self.ticket(*case).exists()]
        tickets = [(self.retrained(*case), (self.ticket(*case),), case[1]) for case in there]
        # what tickets of trained weights and tickets at initialisation are set against
        dense = [
            (self.folder / "retrained" / f"dense-{source}-{rewind}-{seed}", (path, "--dense", "--rewind", rewind), seed)
            for seed in SEEDS
            for source, path in (("dense", self.dense(seed)), ("loft", self.source("loft", seed)))
            for rewind in ("none", "init")
        ]
        side_by_side([
            lambda path=path, what=what, seed=seed: train(path, "retrain", *what, *RECIPE, "--seed", seed, threads=1)
            for path, what, seed in tickets + dense
        ])  # fmt: skip
        self.runs = [self.dense(seed) for seed in SEEDS] + [self.source("loft", seed) for seed in SEEDS]
        self.runs += [path for path, _, _ in tickets + dense]

    def compare(self) -> list[dict[str, Any]]:
        plot = self.folder / "plots" / "tickets.png"
        command = ("compare", *self.runs, "--repetitions", 5, "--robustness", "--severity", 3, "--plot", plot, "--format", "json")
        return json.loads(loft(*command, ranks=2))["tickets"]


def accuracies(records: Sequence[dict[str, Any]]) -> str:
    """A row for each finder, a column for each ratio: accuracy, and the density that it comes with; grouped by what is comparable."""
    tickets = [record for record in records if record["kind"] != "dense"]
    rows = []
    for start, method, kind in dict.fromkeys((record["start"], record["method"], record["kind"]) for record in tickets):
        mine = {
            f"{record['pruning_ratio_asked']:g}": record
            for record in tickets
            if (record["start"], record["method"], record["kind"]) == (start, method, kind)
        }
        cells = [_cell(mine.get(ratio)) for ratio in RATIOS]
        some = [mine[ratio] for ratio in RATIOS if ratio in mine]
        epochs = " / ".join(f"{record['finding_epochs']:.0f}" for record in some)
        rows.append([start, method, kind, *cells, epochs])
    dense = [
        [record["start"] or "not retrained", record["method"], "dense", _cell(record), "", "", f"{record['finding_epochs']:.0f}"]
        for record in records
        if record["kind"] == "dense"
    ]
    header = ["starts from", "found by", "ticket of", *(f"pruned {100 * float(ratio):g} %" for ratio in RATIOS), "epochs to find it"]
    return table(header, sorted(dense + rows, key=lambda row: (row[0] != "not retrained", row[0])))


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "none"
    half = record["accuracy_half_width"]
    return (
        f"{100 * record['accuracy_mean']:.1f}"
        + (f" +- {100 * half:.1f}" if half is not None else "")
        + f" ({100 * record['density']:.1f} %)"
    )


def measures(records: Sequence[dict[str, Any]], ratio: str) -> str:
    """What else the tickets of one ratio are."""
    shown = [record for record in records if record["kind"] == "dense" or f"{record['pruning_ratio_asked']:g}" == ratio]
    rows = [
        [
            record["method"], f"{100 * record['density']:.1f} %", f"{100 * record['flops_share']:.1f} %", f"{100 * record['training_memory_share']:.0f} %",
            f"{record['speedup']:.2f}x", f"{100 * record['energy_saved_share']:.0f} %", f"{100 * record['accuracy_fgsm']:.1f}",
            f"{100 * record['accuracy_pgd']:.1f}", f"{100 * record['accuracy_corrupted']:.1f}",
        ]
        for record in shown
    ]  # fmt: skip
    header = ["found by", "parameters", "FLOPs", "training memory", "speed-up", "energy saved (estimate)", "FGSM", "PGD", "corrupted"]
    return table(header, rows)


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/compare-tickets"), show_default=True)
@click.option("--into", type=click.Path(path_type=Path, exists=True), help="The page to renew: docs/results.md.")
def main(folder: Path, into: Path | None) -> None:
    comparison, began = Comparison(folder), time.perf_counter()

    def done(what: str) -> None:
        click.echo(f"{(time.perf_counter() - began) / 60:5.1f} min: {what}", err=True)

    comparison.pretrain()
    done("dense networks, and LoFT on 4 ranks")
    comparison.find()
    done("tickets found")
    comparison.retrain()
    done("tickets retrained")
    records = comparison.compare()
    (folder / "tickets.json").write_text(to_json_text(records, indent=2))
    done("compared")
    blocks = {"finders": accuracies(records), "measures": measures(records, RATIOS[1])}
    for name, block in blocks.items():
        click.echo(f"\n## {name}\n\n{block}")
    for missing in comparison.missing:
        click.echo(f"no ticket: {missing} (masks do not stand still)")
    if into:
        renew(into, blocks, folder / "plots")


if __name__ == "__main__":
    main()
