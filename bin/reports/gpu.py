"""Writes docs/gpu.md out of what `bin/gpu run` left in FOLDER on a CUDA machine: bin/report gpu FOLDER.

Figures of a rehearsal on a CPU are refused.
"""

import json
from pathlib import Path
from typing import Any

import click

from page import table

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def machine_lines(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(
        f"{name} {facts[key]}" for name, key in (("torch", "torch"), ("cuDNN", "cudnn"), ("NCCL", "nccl"), ("Python", "python"))
    )
    return [f"One **{facts['gpu']}** ({facts['gpus']} in the machine), {facts['cpu_cores']} cores; {versions}.", ""]


def check_lines(folder: Path) -> list[str]:
    found = {int(file.stem.split("-")[1]): json.loads(file.read_text()) for file in folder.glob("checks-*.json")}
    names = dict.fromkeys(name for checks in found.values() for name in checks)
    rows = []
    for name in names:
        said = [checks[name] for _, checks in sorted(found.items()) if name in checks]
        rows.append([name, *("ok" if one["ok"] else "**failed**" for one in said), str(said[-1]["said"] or said[-1]["problems"])])
    heads = [f"{ranks} rank{'s' * (ranks > 1)}" for ranks in sorted(found)]
    return ["## Checks", "", "Ranks share the GPU (`bin/gpu run checks`).", "", table(["check", *heads, "said, on most ranks"], rows), ""]


def bench_lines(rows: list[dict[str, Any]]) -> list[str]:
    plain = {(row["case"], row["precision"], row["batch"]): row for row in rows if row["side"] == "plain"}
    dense = {(row["precision"], row["batch"]): row for row in rows if (row["case"], row["side"]) == ("dense", "ours")}
    shown = []
    for row in rows:
        other, whole = plain.get((row["case"], row["precision"], row["batch"])), dense.get((row["precision"], row["batch"]))
        shown.append(
            [
                row["case"], row["side"], row["precision"], str(row["batch"]), f"{row['launch_ms']:.2f}", f"{row['step_ms']:.2f}",
                f"{row['streamed_ms']:.2f}", f"{row['tflops_per_second']:.1f}",
                f"{row['streamed_ms'] / other['streamed_ms']:.2f}" if other and row["side"].startswith("ours") else "",
                f"{row['streamed_ms'] / whole['streamed_ms']:.2f}" if whole else "",
            ]
        )  # fmt: skip
    header = ["network", "loop", "precision", "batch", "launch, ms", "step, ms", "streamed, ms", "TFLOP/s", "of a plain loop's", "of dense"]
    return ["## A step", "", "`bin/gpu run bench`: what the columns mean is said in bin/gpu_stages/bench.py.", "", table(header, shown), ""]


def table_lines(runs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for run in runs:
        results = run["results"] or {}
        rate = run["images_per_second_per_rank"][-1:] or [0]
        rows.append(
            [
                run["run"], str(run["ranks"]), run["status"], f"{100 * results.get('accuracy', 0):.2f} %", f"{results.get('wall_seconds', 0):.1f}",
                f"{sum(run['exchange_seconds']):.1f}", f"{rate[0]:,.0f}",
            ]
        )  # fmt: skip
    header = ["run", "ranks", "status", "test accuracy", "seconds", "of them exchange", "images/s of a rank, last epoch"]
    text = "`bin/gpu run table`: one seed, untuned; `pre` is pretraining on so many ranks that share the GPU, `again` a ticket of it, retrained."
    return ["## Fashion-MNIST", "", text, "", table(header, rows), ""]


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    def read(name: str) -> Any:
        file = folder / name
        return json.loads(file.read_text()) if file.exists() else None

    facts = read("machine.json")
    if not facts or not facts["gpu"]:
        raise SystemExit(
            f"bin/report: {folder} holds no figures of a GPU: run bin/gpu run doctor checks smoke bench table on a CUDA machine"
        )
    lines = ["# On a GPU", "", *machine_lines(facts), *check_lines(folder)]
    if bench := read("bench.json"):
        lines += bench_lines(bench)
    if (folder / "exchange.txt").exists():
        lines += ["## The exchange", "", *("    " + line for line in (folder / "exchange.txt").read_text().splitlines()), ""]
    if runs := read("table.json"):
        lines += table_lines(runs)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    click.echo(f"wrote {PAGE}: read it")


if __name__ == "__main__":
    main()
