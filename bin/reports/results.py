"""Every table and figure of docs/results.md, from nothing: pretraining, early stops, tickets of snapshots, the theorem.

Runs real jobs with mpirun. What is done is kept under --folder and used again. With --into the page's tables and figures are replaced by
the new ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from loft_hpc.analysis.plots import plot_sweep
from loft_hpc.analysis.size import network_size
from loft_hpc.cli.presets import read_preset
from loft_hpc.data.registry import known_shape
from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.jobs.sweep import Point
from loft_hpc.models.architecture import architecture
from loft_hpc.runs.run import Run

from stopping import stops_at
from trainings import loft, side_by_side, sweep, train, with_interval

SEEDS = (1, 2, 3, 4, 5)
COMPARED_SEEDS = (1, 2, 3)
"""Of LoFT on 2 ranks and of the dense network, beside LoFT on 4."""
RULES = {
    "full pretraining": None,
    "filter distance": Stopping(),
    "Early-Bird's mask distance": Stopping(stability="mask-distance"),
}
CURVE = {0.8: (0, 1, 2, 3, 4, 5, 6, 8, 10), 0.5: (0, 1, 2, 4, 10)}
"""Epochs whose tickets are retrained, by pruning ratio."""
STRATEGIES = {"loft+4": ("loft", 4), "loft+2": ("loft", 2), "data-parallel+2": ("data-parallel", 2)}
ASSUMED_GPU_FLOPS = 1e13
POSTER_ROWS = ("cifar10-preresnet34", "cifar10-resnet34", "cifar100-preresnet34", "cifar100-resnet34", "imagenet-preresnet18")


@dataclass
class Study:
    """The runs, and the blocks of the page that were made of them."""

    folder: Path
    blocks: dict[str, str]

    def run(self, dataset: str, strategy: str, seed: int) -> Path:
        return self.folder / f"{dataset}-{strategy}-{seed}"

    @property
    def plots(self) -> Path:
        return self.folder / "plots"

    def pretrain(self, dataset: str, strategy: str, seed: int) -> None:
        kind, ranks = STRATEGIES[strategy]
        options = ("--preset", dataset, "--strategy", kind, "--evaluate-every", "1000", "--seed", seed)
        train(self.run(dataset, strategy, seed), "pretrain", *options, ranks=ranks)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


# -- stopping ---------------------------------------------------------------------------------------------------------------


def until(run: Path, snapshot: str) -> tuple[float, float, float]:
    """(epochs, gigabytes delivered to the ranks, seconds of training) up to a snapshot."""
    opened = Run.open(run)
    step = opened.score_steps()[opened.snapshot_names().index(_name(snapshot))]
    bytes_ = next(event["payload_received_bytes"] for event in opened.events("ledger") if event["step"] == step)
    seconds = sum(event["train_wall_seconds"] for event in opened.events("epoch") if event["step"] <= step)
    return step / opened.description["steps_per_epoch"], bytes_ / 1e9, seconds


def _name(snapshot: str) -> str:
    return f"epoch-{int(snapshot.split(':')[1]):03d}"


def stopping(study: Study, points: dict[tuple[Path, float, str], dict[str, Any]], random: dict[Path, float]) -> None:
    """What the rules would have saved, and what their tickets are worth."""
    header = [
        "data", "pretraining ends by", "epochs", "GB delivered", "seconds", "saved: epochs", "bytes", "seconds",
        "80 % ticket, retrained", "points against full pretraining's ticket",
    ]  # fmt: skip
    rows = []
    for dataset in ("textures", "digits"):
        runs = [study.run(dataset, "loft+4", seed) for seed in SEEDS]
        whole = [until(run, "epoch:10") for run in runs]
        final = [100 * points[run, 0.8, "epoch:10"]["accuracy"] for run in runs]
        for name, rule in RULES.items():
            stops = ["epoch:10" if rule is None else stops_at(run, rule) for run in runs]
            spent = [until(run, stop) for run, stop in zip(runs, stops, strict=True)]
            accuracies = [100 * points[run, 0.8, stop]["accuracy"] for run, stop in zip(runs, stops, strict=True)]
            saved = [
                with_interval([100 * (1 - part[k] / all_[k]) for part, all_ in zip(spent, whole, strict=True)], 0) + " %" for k in range(3)
            ]
            difference = with_interval([one - other for one, other in zip(accuracies, final, strict=True)], sign=True)
            means = [sum(values) / len(values) for values in zip(*spent, strict=True)]
            rows.append(
                [dataset, name, f"{means[0]:.1f}", f"{means[1]:.2f}", f"{means[2]:.1f}"]
                + (["", "", ""] if rule is None else saved)
                + [with_interval(accuracies) + " %", "" if rule is None else difference]
            )
        drawn = [random[run] for run in runs]
        rows.append(
            [dataset, "full, but random filters", *[""] * 6, with_interval(drawn) + " %",
             with_interval([one - other for one, other in zip(drawn, final, strict=True)], sign=True)]
        )  # fmt: skip
    study.blocks["stopping"] = table(header, rows)


def really_stopped(study: Study) -> None:
    """Trainings that do stop: the same network, bit by bit, as the whole one had at that snapshot."""
    rows = []
    for dataset in ("textures", "digits"):
        whole, path = study.run(dataset, "loft+4", 1), study.folder / f"{dataset}-stopped"
        results = train(
            path, "pretrain", "--preset", dataset, "--evaluate-every", "1000", "--seed", 1, "--stop-when-stable", ranks=4
        )  # fmt: skip
        stop = stops_at(whole, Stopping())
        snapshot, model = Run.open(whole).read_snapshot(_name(stop)), Run.open(path).read_model()
        same = all(torch.equal(snapshot[name], model[name]) for name in snapshot)
        full = json.loads((whole / "run.json").read_text())["results"]
        rows.append(
            [dataset, f"{stop.split(':')[1]} of 10", "yes" if same else "NO", f"{results['wall_seconds']:.1f} s",
             f"{full['wall_seconds']:.1f} s", f"{100 * results['accuracy']:.2f} %", f"{100 * full['accuracy']:.2f} %"]
        )  # fmt: skip
    header = [
        "data, seed 1",
        "stopped after epoch",
        "bitwise the full run's snapshot",
        "wall time",
        "of the full run",
        "network",
        "full run's",
    ]
    study.blocks["stopped"] = table(header, rows)


# -- tickets of snapshots ---------------------------------------------------------------------------------------------------


def sweeps(study: Study) -> list[dict[str, Any]]:
    """Retrain what the figure and the comparison of the rules need."""
    calls = []

    def at(epochs: Sequence[str]) -> list[str]:
        return [word for point in epochs for word in ("--at", point)]

    for ratio, epochs in CURVE.items():
        for strategy in STRATEGIES:
            for seed in SEEDS if (strategy, ratio) == ("loft+4", 0.8) else COMPARED_SEEDS:
                run = study.run("textures", strategy, seed)
                wanted = [f"epoch:{epoch}" for epoch in epochs]
                if (strategy, ratio) == ("loft+4", 0.8):
                    wanted = list(dict.fromkeys([*wanted, *(stops_at(run, rule) for rule in RULES.values() if rule)]))
                calls.append(partial(sweep, run, "--preset", "textures", "--ratio", ratio, *at(wanted)))
    for seed in SEEDS:
        run = study.run("digits", "loft+4", seed)
        wanted = dict.fromkeys(["epoch:0", "epoch:10", *(stops_at(run, rule) for rule in RULES.values() if rule)])
        calls.append(partial(sweep, run, "--preset", "digits", "--ratio", 0.8, *at(list(wanted))))
    return [point for points in side_by_side(calls) for point in points]


def random_tickets(study: Study) -> dict[Path, float]:
    """Accuracy in per cent of tickets with as many filters of each block of the final network, drawn at random."""

    def one(dataset: str, run: Path) -> float:
        ticket = run / "tickets" / "random-seed0-0.8"
        if not ticket.exists():
            loft("prune", run, "--method", "random", "--ratio", 0.8, threads=1)
        return (
            100 * train(run / "retrained-random", "retrain", ticket, "--preset", dataset, "--evaluate-every", "1000", threads=1)["accuracy"]
        )

    runs = [(dataset, study.run(dataset, "loft+4", seed)) for dataset in ("textures", "digits") for seed in SEEDS]
    return dict(zip([run for _, run in runs], side_by_side([partial(one, *pair) for pair in runs]), strict=True))


def emergence(study: Study, points: list[dict[str, Any]]) -> None:
    """The figure of accuracy over the snapshot's epoch, and its table."""
    mine = [point for point in points if "textures" in point["run"]]
    known = set(Point.__dataclass_fields__)
    drawn = [Point(**{name: value for name, value in point.items() if name in known}) for point in mine]
    regular = [point for point in drawn if int(point.snapshot.split(":")[1]) in CURVE[point.ratio]]
    plot_sweep(regular, study.plots / "sweep.png")
    rows = []
    for ratio, epochs in CURVE.items():
        for label in STRATEGIES:
            of_label = [point for point in regular if (point.label, point.ratio) == (label, ratio)]
            cells = []
            for epoch in CURVE[0.8]:
                values = [100 * point.accuracy for point in of_label if point.snapshot == f"epoch:{epoch}"]
                cells.append(f"{sum(values) / len(values):.1f}" if values and epoch in epochs else "")
            dense = {point.run: 100 * point.dense_accuracy for point in of_label}
            rows.append([label, f"{100 * ratio:g} %", str(len(dense)), *cells, f"{sum(dense.values()) / len(dense):.1f}"])
    header = ["strategy", "pruned", "seeds", *(f"epoch {epoch}" for epoch in CURVE[0.8]), "not pruned"]
    study.blocks["emergence"] = table(header, rows)


def distances(study: Study) -> None:
    """The heat maps of seed 1, and mean distances over the seeds."""
    runs = [study.run("textures", strategy, 1) for strategy in STRATEGIES]
    loft("measure", *runs, "--distance-to", "final", "--plot", study.plots / "distance.png")
    rows = []
    for strategy in STRATEGIES:
        seeds = SEEDS if strategy == "loft+4" else COMPARED_SEEDS
        of_strategy = []
        for seed in seeds:
            printed = json.loads(loft("measure", study.run("textures", strategy, seed), "--distance-to", "final", "--format", "json"))
            of_strategy.append([row["mean_normalised"] for row in printed["distances"]])
        means = [sum(values) / len(values) for values in zip(*of_strategy, strict=True)]
        losses = [[event["loss"] for event in Run.open(study.run("textures", strategy, seed)).events("epoch")] for seed in seeds]
        loss = [sum(values) / len(values) for values in zip(*losses, strict=True)]
        rows.append([strategy, "distance to final", str(len(seeds)), *(f"{value:.3f}" for value in means)])
        rows.append(["", "training loss", "", "", *(f"{value:.2f}" for value in loss)])
    study.blocks["distance"] = table(["strategy", "", "seeds", *(f"epoch {epoch}" for epoch in range(11))], rows)


# -- the rest ---------------------------------------------------------------------------------------------------------------


def theory(study: Study) -> None:
    file = study.folder / "theory.json"
    if not file.exists():
        ranks = os.cpu_count()
        text = loft("theory", "--plot", study.plots / "theory.png", "--format", "json", ranks=ranks)
        file.write_text(text)
    found = json.loads(file.read_text())

    def cell(record: dict[str, Any], term: str) -> str:
        half = record[f"{term}_half_width_95"]
        return f"{record[term]:.3g} +- {half:.1g}"

    shown = [record for record in found["cells"] if record["workers"] > 1 and record["filters"] in (64, 512, 4096)]
    terms = ("spread", "drift", "outputs", "total")
    rows = [[str(record["workers"]), str(record["filters"]), *(cell(record, term) for term in terms)] for record in shown]
    slopes = {(slope["workers"], slope["term"]): f"{slope['exponent']:+.2f} +- {slope['half_width']:.2f}" for slope in found["slopes"]}
    workers = sorted({record["workers"] for record in shown})
    exponents = [[str(count), *(slopes.get((count, term), "") for term in terms)] for count in workers]
    names = ["spread over deals", "drift of the mean", "outputs", "left-hand side"]
    study.blocks["theory"] = "\n\n".join(
        [
            table(["S", "m", *names], sorted(rows, key=lambda row: (int(row[0]), int(row[1])))),
            "Exponent b of m^b, least squares over seven m from 64 to 4096:",
            table(["S", *names], exponents),
            "\n".join(f"* {remark}" for remark in found["remarks"]),
        ]
    )


def largest_filters(study: Study) -> None:
    """bin/bench tickets on the digits runs."""
    file = study.folder / "tickets.txt"
    if not file.exists():
        script = Path(__file__).parent.parent / "benchmarks" / "tickets.py"
        runs = [str(study.run("digits", "loft+4", seed)) for seed in COMPARED_SEEDS]
        words = ["mpirun", "-np", "1", sys.executable, str(script), *runs]
        file.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    number = r"\s*([\d.]+(?: \+-\s+[\d.]+)?)"
    found = re.findall(rf"-(\d+)  ratio ([\d.]+):  global{number}  same shape{number}  \|  layer{number}  random{number}", file.read_text())
    header = ["seed", "ratio", "`--scope global`", "same shape, random filters", "`--scope layer`", "random, as many per block"]
    study.blocks["tickets"] = table(header, [[re.sub(r"\s+", " ", cell) for cell in row] for row in found])


def poster(study: Study) -> None:
    """What the poster's rows would take."""
    run = Run.open(study.run("textures", "loft+4", 1))
    event = run.events("epoch")[-1]
    size = run.description["data"]["image_size"]
    shares = {name: -(-width // 4) for name, width in run.architecture.hidden_widths().items()}
    dealt = {name: width for name, width in shares.items() if not name.endswith(".0") and not name.startswith("layer1")}
    sub = network_size(run.architecture, dealt, size).flops
    sustained = 3 * sub * event["images_per_second_per_rank"] * 4
    rows = []
    for name in POSTER_ROWS:
        preset = read_preset(name)
        shape, recipe = known_shape(preset["pretrain"]["dataset"]), preset["retrain"]
        network = architecture(preset["pretrain"]["model"], shape.num_classes, shape.channels, shape.stem, preset["pretrain"]["widen"])
        full = network_size(network, None, shape.image_size).flops
        part = {k: -(-width // 4) for k, width in network.hidden_widths().items() if not k.endswith(".0") and not k.startswith("layer1")}
        pretraining = 4 * preset["pretrain"]["epochs"] * shape.train_images * 3 * network_size(network, part, shape.image_size).flops
        retraining = 0.0
        for ratio in preset["prune"]["ratio"]:
            kept = {k: max(1, round(width * (1 - ratio))) for k, width in network.hidden_widths().items() if not k.endswith(".0")}
            retraining += recipe["epochs"] * shape.train_images * 3 * network_size(network, kept, shape.image_size).flops
        flops = pretraining + retraining
        rows.append(
            [
                name,
                f"{full / 1e9:.2f}",
                f"{pretraining:.1e}",
                f"{retraining:.1e}",
                f"{flops / sustained / 3600:,.0f}",
                f"{flops / ASSUMED_GPU_FLOPS / 3600:,.0f}",
            ]
        )
    header = [
        "preset", "GFLOPs an image, forward", "FLOPs of pretraining, 4 workers", "of retraining its tickets",
        "hours at what this machine sustained", "GPU-hours at an assumed 10 TFLOP/s",
    ]  # fmt: skip
    note = f"This machine sustained {sustained / 1e9:.0f} GFLOP/s in LoFT's steps on textures (4 ranks on 2 cores, {event['images_per_second_per_rank']:.0f} images/s a rank)."
    study.blocks["poster"] = f"{note}\n\n{table(header, rows)}"


def write_into(page: Path, study: Study) -> None:
    """Replace the page's blocks and figures."""
    text = page.read_text()
    for name, block in study.blocks.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, block=block: f"{match[1]}\n{block}\n\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} has {count} places for {name}, not one")
    page.write_text(text)
    (page.parent / "plots").mkdir(exist_ok=True)
    for plot in study.plots.glob("*.png"):
        shutil.copy(plot, page.parent / "plots" / plot.name)


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/results"), show_default=True)
@click.option("--into", type=click.Path(path_type=Path, exists=True), help="The page to renew: docs/results.md.")
def main(folder: Path, into: Path | None) -> None:
    study, began = Study(folder, {}), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    def done(what: str) -> None:
        click.echo(f"{(time.perf_counter() - began) / 60:5.1f} min: {what}", err=True)

    # What is timed first, with nothing beside it.
    for seed in SEEDS:
        study.pretrain("textures", "loft+4", seed)
        study.pretrain("digits", "loft+4", seed)
    done("LoFT on 4 ranks")
    really_stopped(study)
    for seed in COMPARED_SEEDS:
        study.pretrain("textures", "loft+2", seed)
        study.pretrain("textures", "data-parallel+2", seed)
    done("early stops, LoFT on 2 ranks and dense networks")
    theory(study)
    done("theorem")
    points = sweeps(study)
    done("tickets retrained")
    by_place = {(Path(point["run"]), point["ratio"], point["snapshot"]): point for point in points}
    stopping(study, by_place, random_tickets(study))
    emergence(study, points)
    distances(study)
    largest_filters(study)
    poster(study)
    done("everything")
    for name, block in study.blocks.items():
        click.echo(f"\n## {name}\n\n{block}")
    if into:
        write_into(into, study)


if __name__ == "__main__":
    main()
