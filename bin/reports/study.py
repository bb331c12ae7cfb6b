"""The runs behind docs/results.md: which there are, where they lie, and how they are made."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loft_hpc.filterwise.emergence import Stopping

from stopping import stops_at
from trainings import loft, side_by_side, sweep, train

SEEDS = (1, 2, 3, 4, 5)
COMPARED_SEEDS = (1, 2, 3)
"""Of LoFT on 2 ranks and of the dense network, beside LoFT on 4."""
DATASETS = ("textures", "digits")
STRATEGIES = {"loft+4": ("loft", 4), "loft+2": ("loft", 2), "data-parallel+2": ("data-parallel", 2)}
RULES = {
    "full pretraining": None,
    "filter distance": Stopping(),
    "Early-Bird's mask distance": Stopping(stability="mask-distance"),
}
CURVE = {0.8: (0, 2, 3, 4, 6, 10), 0.5: (0, 3, 10)}
"""Epochs whose tickets are retrained for the figure, by pruning ratio."""
QUIET = ("--evaluate-every", "1000")


@dataclass
class Study:
    """One folder of runs, and the page's blocks made of them so far."""

    folder: Path
    blocks: dict[str, str] = field(default_factory=dict)

    @property
    def plots(self) -> Path:
        return self.folder / "plots"

    def run(self, dataset: str, strategy: str, seed: int) -> Path:
        return self.folder / f"{dataset}-{strategy}-{seed}"

    def seeds(self, strategy: str, ratio: float = 0.8) -> Sequence[int]:
        """Of textures; half tickets are the costly ones."""
        if ratio == 0.5:
            return () if strategy == "loft+2" else COMPARED_SEEDS[:2]
        return SEEDS if strategy == "loft+4" else COMPARED_SEEDS

    def pretrain(self, dataset: str, strategy: str, seed: int) -> None:
        kind, ranks = STRATEGIES[strategy]
        options = ("--preset", dataset, "--strategy", kind, *QUIET, "--seed", seed)
        train(self.run(dataset, strategy, seed), "pretrain", *options, ranks=ranks)

    def stop(self, dataset: str) -> tuple[Path, dict[str, Any]]:
        """The training of seed 1 that stops by itself: its folder and its results."""
        path = self.folder / f"{dataset}-stopped"
        return path, train(path, "pretrain", "--preset", dataset, *QUIET, "--seed", 1, "--stop-when-stable", ranks=4)

    def theorem(self, ranks: int) -> dict[str, Any]:
        file = self.folder / "theory.json"
        if not file.exists():
            file.write_text(loft("theory", "--plot", self.plots / "theory.png", "--format", "json", ranks=ranks))
        return json.loads(file.read_text())

    def retrain_tickets(self) -> list[dict[str, Any]]:
        """The tickets of snapshots that the figure and the comparison of the rules need: the points of all sweeps."""
        calls = []
        for ratio, epochs in CURVE.items():
            for strategy in STRATEGIES:
                for seed in self.seeds(strategy, ratio):
                    run, at = self.run("textures", strategy, seed), [f"epoch:{epoch}" for epoch in epochs]
                    if (strategy, ratio) == ("loft+4", 0.8):
                        at += _stops(run)
                    calls.append(partial(_sweep, run, "textures", ratio, at))
        for seed in SEEDS:
            run = self.run("digits", "loft+4", seed)
            calls.append(partial(_sweep, run, "digits", 0.8, ["epoch:0", "epoch:10", *_stops(run)]))
        return [point for points in side_by_side(calls) for point in points]

    def retrain_random_tickets(self) -> dict[Path, float]:
        """Accuracy in per cent of tickets with as many filters of each block of the final network, drawn at random, by run."""
        runs = {self.run(dataset, "loft+4", seed): dataset for dataset in DATASETS for seed in SEEDS}
        return dict(zip(runs, side_by_side([partial(_random, run, dataset) for run, dataset in runs.items()]), strict=True))


def _stops(run: Path) -> list[str]:
    return [stops_at(run, rule) for rule in RULES.values() if rule]


def _sweep(run: Path, dataset: str, ratio: float, at: Sequence[str]) -> list[dict[str, Any]]:
    chosen = [word for point in dict.fromkeys(at) for word in ("--at", point)]
    return sweep(run, "--preset", dataset, "--ratio", ratio, *chosen)


def _random(run: Path, dataset: str) -> float:
    ticket = run / "tickets" / "random-seed0-0.8"
    if not ticket.exists():
        loft("prune", run, "--method", "random", "--ratio", 0.8, threads=1)
    return 100 * train(run / "retrained-random", "retrain", ticket, "--preset", dataset, *QUIET, threads=1)["accuracy"]
