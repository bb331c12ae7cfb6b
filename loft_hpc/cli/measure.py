"""`loft measure`."""

from dataclasses import asdict
from pathlib import Path

import click

from loft_hpc.analysis.distance import NORMS
from loft_hpc.analysis.size import FLOPS_PER_MULTIPLY_ADD
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import device_option, moved_data_option
from loft_hpc.jobs.measure import Distances, Measured, distances, measure


@click.command("measure")
@click.argument("paths", metavar="RUN_OR_TICKET...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--distance-to",
    metavar="WHAT",
    help="Filter distance in place of the other measures: of each snapshot to the run's own 'final' network, or of the final network to 'init', 'epoch:K', another RUN or a snapshot file.",
)
@click.option(
    "--norm", type=click.Choice(list(NORMS)), default="l2", show_default=True, help="Norm that ranks the filters for --distance-to."
)
@moved_data_option
@click.option("--latency-batch", type=click.IntRange(1), default=64, show_default=True, help="Images in a timed forward pass.")
@click.option("--repetitions", type=click.IntRange(2), default=20, show_default=True, help="Timed forward passes of each network.")
@device_option
@format_option
@click.pass_context
def command(
    context: click.Context, paths: tuple[str, ...], distance_to: str | None, norm: str, data_dir: str | None, latency_batch: int,
    repetitions: int, device: str, format: str,
) -> None:  # fmt: skip
    """Accuracy, parameters, FLOPs and latency of runs and tickets, each beside the dense network; or filter distances.

    FLOPs count a multiply-add as 2, in convolutions and the classifier. Latency is the median wall time of a forward pass on this
    machine, dense and pruned taking turns (under mpirun: on rank 0, while the others wait).

    Example: loft measure runs/RUN runs/RUN/tickets/*
    """
    job: Job = context.obj
    job.join()
    if distance_to is not None:
        found = {path: distances(Path(path), distance_to, norm) for path in paths}
        job.show(
            format, _distance_fields(found, distance_to, norm), "\n\n".join(_distance_table(path, rows) for path, rows in found.items())
        )
        return
    results = measure([Path(path) for path in paths], data_dir, latency_batch, repetitions, device, job.world)
    fields = {"flops_per_multiply_add": FLOPS_PER_MULTIPLY_ADD, "measured": [_fields(result) for result in results]}
    rows = [_row(result) for result in results]
    header = [
        "network",
        "kind",
        "accuracy",
        "parameters",
        "of dense",
        "FLOPs",
        "of dense",
        f"ms/{latency_batch} images",
        "dense ms",
        "speed-up",
    ]
    notes = f"FLOPs per image, a multiply-add counting 2; latency: median of {repetitions} passes"
    job.show(format, fields, f"{table(header, rows)}\n{notes}")


def _row(result: Measured) -> list[str]:
    mine, dense = result.latency.median_seconds, result.dense_latency.median_seconds
    return [
        str(result.subject.path),
        result.subject.kind,
        f"{100 * result.score.accuracy:.2f} %",
        f"{result.size.parameters:,}",
        f"{100 * result.size.parameters / result.dense.parameters:.1f} %",
        f"{result.size.flops:,}",
        f"{100 * result.size.flops / result.dense.flops:.1f} %",
        f"{1e3 * mine:.2f}",
        f"{1e3 * dense:.2f}",
        f"{dense / mine:.2f}x",
    ]


def _fields(result: Measured) -> dict:
    return {
        "path": str(result.subject.path),
        "kind": result.subject.kind,
        "dataset": result.subject.data.dataset,
        "synthetic_data": result.subject.data.synthetic,
        "accuracy": result.score.accuracy,
        "test_loss": result.score.loss,
        "test_images": result.score.images,
        "parameters": result.size.parameters,
        "dense_parameters": result.dense.parameters,
        "flops": result.size.flops,
        "dense_flops": result.dense.flops,
        "latency": asdict(result.latency),
        "dense_latency": asdict(result.dense_latency),
    }


def _distance_fields(found: dict[str, list[Distances]], reference: str, norm: str) -> dict:
    return {
        "reference": reference,
        "norm": norm,
        "distances": [
            {"path": path, "label": row.label, "mean_normalised": row.mean_normalised, "groups": [asdict(group) for group in row.groups]}
            for path, rows in found.items()
            for row in rows
        ],
    }


def _distance_table(path: str, rows: list[Distances]) -> str:
    """Groups down, snapshots across; values normalised by the expectation for a random ranking."""
    header = ["block", "filters", *(row.label for row in rows)]
    lines = [
        [group.group, str(group.filters), *(f"{row.groups[number].normalised:.3f}" for row in rows)]
        for number, group in enumerate(rows[0].groups)
    ]
    lines.append(["mean", "", *(f"{row.mean_normalised:.3f}" for row in rows)])
    return f"{path}: filter distance / its expectation for a random ranking\n{table(header, lines)}"
