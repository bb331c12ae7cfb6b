"""Every table and figure of docs/results.md, from nothing: pretraining, early stops, tickets of snapshots, the theorem.

Runs real jobs with mpirun. What is done is kept under --folder and used again. With --into the page's tables and figures are replaced by
the new ones.
"""

import os
import time
from pathlib import Path
from typing import Any

import click

import emergence
from estimates import poster
from page import renew, table
from study import COMPARED_SEEDS, DATASETS, SEEDS, Study


def theorem(found: dict[str, Any]) -> str:
    """Three of the grid's m, all exponents, and the remarks."""
    terms = {"spread": "spread over deals", "drift": "drift of the mean", "outputs": "outputs", "total": "left-hand side"}
    shown = [record for record in found["cells"] if record["workers"] > 1 and record["filters"] in (64, 512, 4096)]
    shown.sort(key=lambda record: (record["workers"], record["filters"]))
    cells = [
        [
            str(record["workers"]),
            str(record["filters"]),
            *(f"{record[term]:.3g} +- {record[f'{term}_half_width_95']:.1g}" for term in terms),
        ]
        for record in shown
    ]
    slopes = {(slope["workers"], slope["term"]): f"{slope['exponent']:+.2f} +- {slope['half_width']:.2f}" for slope in found["slopes"]}
    exponents = [
        [str(workers), *(slopes.get((workers, term), "not positive everywhere") for term in terms)]
        for workers in sorted({record["workers"] for record in shown})
    ]
    parts = [
        table(["S", "m", *terms.values()], cells),
        "Exponent b of m^b, least squares over seven m from 64 to 4096:",
        table(["S", *terms.values()], exponents),
        "\n".join(f"* {remark}" for remark in found["remarks"]),
    ]
    return "\n\n".join(parts)


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/results"), show_default=True)
@click.option("--into", type=click.Path(path_type=Path, exists=True), help="The page to renew: docs/results.md.")
def main(folder: Path, into: Path | None) -> None:
    study, began = Study(folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    def done(what: str) -> None:
        click.echo(f"{(time.perf_counter() - began) / 60:5.1f} min: {what}", err=True)

    # What is timed comes first, with nothing beside it.
    for seed in SEEDS:
        for dataset in DATASETS:
            study.pretrain(dataset, "loft+4", seed)
    for dataset in DATASETS:
        study.stop(dataset)
    done("LoFT on 4 ranks, and early stops")
    for seed in COMPARED_SEEDS:
        for strategy in ("loft+2", "data-parallel+2"):
            study.pretrain("textures", strategy, seed)
    done("LoFT on 2 ranks, and dense networks")
    found = study.theorem(os.cpu_count() or 1)
    done("theorem")
    points, random = study.retrain_tickets(), study.retrain_random_tickets()
    done("tickets retrained")
    study.blocks = {
        "distance": emergence.distances(study),
        "tickets": emergence.tickets(study, points),
        "stopping": emergence.stopping(study, points, random),
        "stopped": emergence.stopped(study),
        "largest": emergence.largest_filters(study),
        "theory": theorem(found),
        "poster": poster(study),
    }
    for name, block in study.blocks.items():
        click.echo(f"\n## {name}\n\n{block}")
    if into:
        renew(into, study.blocks, study.plots)
    done("everything")


if __name__ == "__main__":
    main()
