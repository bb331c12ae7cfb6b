"""Tables and figures about tickets: how far rankings move, what snapshots' tickets are worth, what stopping early saves."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loft_hpc.analysis.plots import plot_sweep
from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.jobs.sweep import Point
from loft_hpc.runs.run import Run

from page import table
from stopping import stops_at
from study import COMPARED_SEEDS, CURVE, DATASETS, RULES, SEEDS, STRATEGIES, Study
from trainings import loft, with_interval


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def distances(study: Study) -> str:
    """The heat maps of seed 1, and mean distances and losses over the seeds."""
    runs = [study.run("textures", strategy, 1) for strategy in STRATEGIES]
    loft("measure", *runs, "--distance-to", "final", "--plot", study.plots / "distance.png")
    rows = []
    for strategy in STRATEGIES:
        runs = [study.run("textures", strategy, seed) for seed in study.seeds(strategy)]
        printed = [json.loads(loft("measure", run, "--distance-to", "final", "--format", "json"))["distances"] for run in runs]
        losses = [[event["loss"] for event in Run.open(run).events("epoch")] for run in runs]
        means = [_mean([row["mean_normalised"] for row in snapshot]) for snapshot in zip(*printed, strict=True)]
        rows.append([strategy, "distance to final", str(len(runs)), *(f"{value:.3f}" for value in means)])
        rows.append(["", "training loss", "", "", *(f"{_mean(epoch):.2f}" for epoch in zip(*losses, strict=True))])
    return table(["strategy", "", "seeds", *(f"epoch {epoch}" for epoch in range(11))], rows)


def tickets(study: Study, points: Sequence[dict[str, Any]]) -> str:
    """The figure of accuracy over the snapshot's epoch, and its table."""
    fields = set(Point.__dataclass_fields__)
    drawn = [Point(**{name: value for name, value in point.items() if name in fields}) for point in points if "textures" in point["run"]]
    drawn = [point for point in drawn if int(point.snapshot.split(":")[1]) in CURVE[point.ratio]]
    plot_sweep(drawn, study.plots / "sweep.png")
    rows = []
    for ratio, epochs in CURVE.items():
        for label in STRATEGIES:
            mine = [point for point in drawn if (point.label, point.ratio) == (label, ratio)]
            if not mine:
                continue
            cells = []
            for epoch in CURVE[0.8]:
                values = [100 * point.accuracy for point in mine if point.snapshot == f"epoch:{epoch}"]
                cells.append(f"{_mean(values):.1f}" if epoch in epochs else "")
            dense = {point.run: 100 * point.dense_accuracy for point in mine}
            rows.append([label, f"{100 * ratio:g} %", str(len(dense)), *cells, f"{_mean(list(dense.values())):.1f}"])
    return table(["strategy", "pruned", "seeds", *(f"epoch {epoch}" for epoch in CURVE[0.8]), "not pruned"], rows)


def _until(run: Path, snapshot: str) -> tuple[float, float, float]:
    """(epochs, gigabytes delivered to the ranks, seconds of training) up to a snapshot."""
    opened = Run.open(run)
    step = opened.snapshots.step(_name(snapshot))
    delivered = next(event["payload_received_bytes"] for event in opened.events("ledger") if event["step"] == step)
    seconds = sum(event["train_wall_seconds"] for event in opened.events("epoch") if event["step"] <= step)
    return step / opened.required("steps_per_epoch", int), delivered / 1e9, seconds


def _name(snapshot: str) -> str:
    return f"epoch-{int(snapshot.split(':')[1]):03d}"


def stopping(study: Study, points: Sequence[dict[str, Any]], random: dict[Path, float]) -> str:
    """What the rules would have saved, and what their tickets are worth."""
    accuracy = {(Path(point["run"]), point["snapshot"]): 100 * point["accuracy"] for point in points if point["ratio"] == 0.8}
    rows = []
    for dataset in DATASETS:
        runs = [study.run(dataset, "loft+4", seed) for seed in SEEDS]
        whole, last = [_until(run, "epoch:10") for run in runs], [accuracy[run, "epoch:10"] for run in runs]

        def judged(values: Sequence[float], last: Sequence[float] = last) -> list[str]:
            differences = [value - other for value, other in zip(values, last, strict=True)]
            return [f"{with_interval(values)} %", with_interval(differences, sign=True)]

        for name, rule in RULES.items():
            stops = ["epoch:10" if rule is None else stops_at(run, rule) for run in runs]
            spent = [_until(run, stop) for run, stop in zip(runs, stops, strict=True)]
            epochs, gigabytes, seconds = (_mean(values) for values in zip(*spent, strict=True))
            saved = [
                with_interval([100 * (1 - part[k] / complete[k]) for part, complete in zip(spent, whole, strict=True)], 0) + " %"
                for k in range(3)
            ]
            worth = judged([accuracy[run, stop] for run, stop in zip(runs, stops, strict=True)])
            row = [dataset, name, f"{epochs:.1f}", f"{gigabytes:.2f}", f"{seconds:.1f}"]
            rows.append([*row, *(saved if rule else [""] * 3), worth[0], worth[1] if rule else ""])
        untrained = judged([accuracy[run, "epoch:0"] for run in runs])
        rows.append([dataset, "none: the initialisation's ticket", "0.0", "0.00", "0.0", "100 %", "100 %", "100 %", *untrained])
        rows.append([dataset, "full, but random filters", *[""] * 6, *judged([random[run] for run in runs])])
    header = [
        "data", "pretraining ends by", "epochs", "GB delivered", "seconds", "saved: epochs", "bytes", "seconds",
        "80 % ticket, retrained", "points against full pretraining's ticket",
    ]  # fmt: skip
    return table(header, rows)


def stopped(study: Study) -> str:
    """Trainings that did stop, beside the whole ones."""
    rows = []
    for dataset in DATASETS:
        whole = study.run(dataset, "loft+4", 1)
        path, results = study.stop(dataset)
        stop = stops_at(whole, Stopping())
        snapshot, model = Run.open(whole).snapshots.read(_name(stop)), Run.open(path).read_model()
        same = all(torch.equal(snapshot[name], model[name]) for name in snapshot)
        full = Run.open(whole).required("results", dict)
        rows.append(
            [dataset, f"{stop.split(':')[1]} of 10", "yes" if same else "NO", f"{results['wall_seconds']:.1f} s",
             f"{full['wall_seconds']:.1f} s", f"{100 * results['accuracy']:.2f} %", f"{100 * full['accuracy']:.2f} %"]
        )  # fmt: skip
    header = [
        "data, seed 1",
        "stopped after epoch",
        "the full run's snapshot, bitwise",
        "wall time",
        "of the full run",
        "accuracy of the stopped network, not pruned",
        "of the full run's",
    ]
    return table(header, rows)


def largest_filters(study: Study) -> str:
    """bin/bench tickets on the digits runs."""
    file = study.folder / "tickets.txt"
    if not file.exists():
        script = Path(__file__).parent.parent / "benchmarks" / "tickets.py"
        runs = [str(study.run("digits", "loft+4", seed)) for seed in COMPARED_SEEDS]
        file.write_text(
            subprocess.run(["mpirun", "-np", "1", sys.executable, str(script), *runs], capture_output=True, text=True, check=True).stdout
        )
    number = r"\s*([\d.]+(?: \+-\s+[\d.]+)?)"
    found = re.findall(rf"-(\d+)  ratio ([\d.]+):  global{number}  same shape{number}  \|  layer{number}  random{number}", file.read_text())
    if len(found) != 3 * len(COMPARED_SEEDS):
        raise SystemExit(f"{file} has {len(found)} lines of figures, not {3 * len(COMPARED_SEEDS)}")
    header = ["seed", "ratio", "`--scope global`", "same shape, random filters", "`--scope layer`", "random, as many per block"]
    return table(header, [[re.sub(r"\s+", " ", cell) for cell in row] for row in found])
