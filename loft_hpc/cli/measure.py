"""`loft measure`."""

from dataclasses import asdict
from pathlib import Path

import click

from loft_hpc.analysis.size import FLOPS_PER_MULTIPLY_ADD
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import device_option, moved_data_option, plot_option, typed
from loft_hpc.jobs.distances import Course, distances
from loft_hpc.jobs.measure import Measured, measure
from loft_hpc.models.scores import CRITERIA


@click.command("measure")
@click.argument("paths", metavar="RUN_OR_TICKET...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--distance-to",
    metavar="WHAT",
    help="In place of the other measures, the filter distance of each snapshot of RUN to its 'final' network, to the 'previous' snapshot, to 'init', 'epoch:K' or 'step:K', to another RUN's final network, or to a snapshot's file.",
)
@click.option("--norm", type=click.Choice(CRITERIA), default="l2", show_default=True, help="What ranks the filters for --distance-to.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Pruning ratio in view of --distance-to: only the filters that it leaves count (0: all).",
)
@plot_option(
    "the distances as a heat map of layers and epochs (darker is closer) over the loss; for several runs their mean distances too."
)
@moved_data_option
@click.option("--latency-batch", type=click.IntRange(1), default=64, show_default=True, help="Images in a timed forward pass.")
@click.option("--repetitions", type=click.IntRange(2), default=20, show_default=True, help="Timed forward passes of each network.")
@device_option
@format_option
@click.pass_context
def command(
    context: click.Context, paths: tuple[str, ...], distance_to: str | None, norm: str, ratio: float, plot: Path | None,
    data_dir: str | None, latency_batch: int, repetitions: int, device: str, format: str,
) -> None:  # fmt: skip
    """Accuracy, parameters, FLOPs and latency of runs and tickets, each beside the dense network; or filter distances.

    FLOPs count a multiply-add as 2, in convolutions and the classifier. Latency is the median wall time of a forward pass on this
    machine, dense and pruned taking turns (under mpirun: on rank 0, while the others wait).

    Examples: loft measure runs/RUN runs/RUN/tickets/*

    loft measure runs/RUN --distance-to final --plot runs/RUN/plots/distance.png
    """
    job: Job = context.obj
    alone = {"plot", "ratio", "norm"} if distance_to is None else {"data_dir", "latency_batch", "repetitions", "device"}
    for name in sorted(alone & typed(context)):
        other = "belongs to --distance-to" if distance_to is None else "has no meaning with --distance-to"
        raise click.UsageError(f"--{name.replace('_', '-')} {other}")
    job.join()
    if distance_to is not None:
        _show_distances(job, paths, distance_to, norm, ratio, plot, format)
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


def _show_distances(job: Job, paths: tuple[str, ...], reference: str, criterion: str, ratio: float, plot: Path | None, format: str) -> None:
    courses = [distances(Path(path), reference, criterion, ratio) for path in paths]
    if plot:
        from loft_hpc.analysis.plots import plot_distances

        job.once(lambda: plot_distances(courses, plot, reference))
    rows = [
        {"path": str(course.path), "label": row.label, "epoch": row.epoch, "step": row.step, "mean_normalised": row.mean_normalised,
         "groups": [asdict(group) for group in row.groups]}
        for course in courses
        for row in course.rows
    ]  # fmt: skip
    fields = {"reference": reference, "norm": criterion, "pruning_ratio_in_view": ratio, "distances": rows}
    job.show(format, fields, "\n\n".join(_distance_table(course) for course in courses))


def _distance_table(course: Course) -> str:
    """Groups down, snapshots across; values normalised by the expectation for a random ranking."""
    header = ["block", "filters", *(row.label for row in course.rows)]
    lines = [
        [group.group, str(group.filters), *(f"{row.groups[number].normalised:.3f}" for row in course.rows)]
        for number, group in enumerate(course.rows[0].groups)
    ]
    lines.append(["mean", "", *(f"{row.mean_normalised:.3f}" for row in course.rows)])
    return f"{course.path}: filter distance / its expectation for a random ranking\n{table(header, lines)}"
