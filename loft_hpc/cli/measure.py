"""`loft measure`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loft_hpc.analysis.energy import grams_per_million
from loft_hpc.analysis.size import FLOPS_PER_MULTIPLY_ADD
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.measuring import NO_TRAINING_MEMORY, measure_options, measure_settings
from loft_hpc.cli.options import device_option, fill, plot_option, reading_options, typed
from loft_hpc.data.registry import Reading
from loft_hpc.jobs.distances import Course, distances
from loft_hpc.jobs.measure import Measured, MeasureSettings, measure
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
    type=float,
    default=0.0,
    show_default=True,
    help="Pruning ratio in view of --distance-to: only the filters that it leaves count (0: all).",
)
@plot_option(
    "the distances as a heat map of layers and epochs (darker is closer), their mean with the rule that ends a training, and the loss."
)
@reading_options
@measure_options(energy=False, robustness=False)
@device_option
@format_option
@click.pass_context
def command(
    context: click.Context, paths: tuple[str, ...], distance_to: str | None, norm: str, ratio: float, plot: Path | None,
    device: str, format: str, **options: Any,
) -> None:  # fmt: skip
    """Accuracy, parameters, FLOPs, memory and latency of runs and tickets, each beside the dense network; energy and robustness; or filter
    distances.

    FLOPs count a multiply-add as 2, in convolutions and the classifier; of a ticket of weights, those that stay, which dense kernels compute
    all the same. Latency is the median wall time of a forward pass on this machine, dense and pruned taking turns (under mpirun: on rank 0,
    while the others wait). Memory in training is that of one batch of as many images, float32.

    Examples: loft measure runs/RUN runs/RUN/tickets/*

    loft measure runs/RUN --distance-to final --plot runs/RUN/plots/distance.png
    """
    job: Job = context.obj
    alone = {"plot", "ratio", "norm"} if distance_to is None else {"device", *options}
    for name in sorted(alone & typed(context)):
        other = "belongs to --distance-to" if distance_to is None else "has no meaning with --distance-to"
        option = {"severities": "severity"}.get(name, name.replace("_", "-"))
        raise click.UsageError(f"--{option} {other}")
    if not 0 <= ratio < 1:  # NaN is neither, which click's own ranges let through
        raise click.UsageError(f"--ratio {ratio:g} must be 0 or more and below 1")
    settings = measure_settings(options)
    job.join()
    if distance_to is not None:
        _show_distances(job, paths, distance_to, norm, ratio, plot, format)
        return
    results = measure([Path(path) for path in paths], settings, fill(Reading, options), device, job.world)
    fields = {"flops_per_multiply_add": FLOPS_PER_MULTIPLY_ADD, "measured": [_fields(result, settings) for result in results]}
    rows = [_row(result) for result in results]
    header = [
        "network",
        "kind",
        "accuracy",
        "parameters",
        "of dense",
        "FLOPs",
        "of dense",
        f"ms/{settings.latency_batch} images",
        "dense ms",
        "speed-up",
        "memory in training",
        "of dense",
    ]
    notes = [f"FLOPs per image, a multiply-add counting 2; latency: median of {settings.repetitions} passes"]
    notes += [f"note: {result.note}" for result in results if result.note]
    if any(result.subject.kind == "ticket" for result in results):
        notes.append("a ticket's accuracy is that before retraining: give the run of loft retrain for the one after it")
    if settings.latency_batch < 2:
        notes.append(NO_TRAINING_MEMORY)
    tables = [table(header, rows), *notes]
    if settings.energy:
        tables += ["", _energy_table(results, settings)]
    if settings.asks_for_robustness:
        tables += ["", _robustness_table(results, settings)]
    job.show(format, fields, "\n".join(tables))


def _energy_table(results: Sequence[Measured], settings: MeasureSettings) -> str:
    rows = []
    for result in results:
        mine, dense = (energy.joules_per_1000_images for energy in result.energy)
        grams = grams_per_million(result.energy[0], settings.carbon_intensity)
        rows.append([str(result.subject.path), f"{mine:.2f}", f"{dense:.2f}", f"{100 * (1 - mine / dense):.1f} %", f"{grams:.3g}"])
    header = ["network", "J/1000 images", "dense", "saved", "g CO2 per million images"]
    source = results[0].energy[0].energy.source
    label = "" if results[0].energy[0].energy.measured else ": an ESTIMATE, busy CPU seconds times watts per core, not a measurement"
    return f"{table(header, rows)}\nenergy from {source}{label}; {settings.carbon_intensity:g} g CO2 per kWh"


def _robustness_table(results: Sequence[Measured], settings: MeasureSettings) -> str:
    names = list(dict.fromkeys(name for result in results for name in _robust_fields(result)))
    rows = [
        [
            str(result.subject.path),
            f"{100 * result.score.accuracy:.2f} %",
            *(f"{100 * _robust_fields(result)[name]:.2f} %" for name in names),
        ]
        for result in results
    ]
    severities = ", ".join(map(str, settings.severities))
    return (
        f"{table(['network', 'clean', *names], rows)}\nattacks: epsilon {settings.epsilon:.4g} of the pixel range, PGD {settings.pgd_steps} steps; "
        f"corruptions: mean over severities {severities}"
    )


def _robust_fields(result: Measured) -> dict[str, float]:
    robustness = result.robustness
    return robustness.attacks | robustness.corruptions | robustness.shifted


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
        *_training_memory(result),
    ]


def _training_memory(result: Measured) -> list[str]:
    share = result.training_memory_share
    return ["none", "none"] if share is None else [f"{result.footprint.training_bytes / 2**20:.1f} MiB", f"{100 * share:.1f} %"]


def _fields(result: Measured, settings: MeasureSettings) -> dict:
    return {
        "path": str(result.subject.path),
        "kind": result.subject.kind,
        "dataset": result.subject.data.dataset,
        "synthetic_data": result.subject.data.synthetic,
        "note": result.note,
        "accuracy": result.score.accuracy,
        "test_loss": result.score.loss,
        "test_images": result.score.images,
        "parameters": result.size.parameters,
        "dense_parameters": result.dense.parameters,
        "flops": result.size.flops,
        "dense_flops": result.dense.flops,
        "latency": asdict(result.latency),
        "dense_latency": asdict(result.dense_latency),
        "throughput_images_per_second": result.latency.throughput,
        "dense_throughput_images_per_second": result.dense_latency.throughput,
        "memory": asdict(result.footprint) | {"training_bytes": result.footprint.training_bytes},
        "dense_memory": asdict(result.dense_footprint) | {"training_bytes": result.dense_footprint.training_bytes},
        **({} if result.energy is None else {"energy": _energy_fields(result, settings)}),
        **({} if result.robustness is None else {"robustness": asdict(result.robustness)}),
    }


def _energy_fields(result: Measured, settings: MeasureSettings) -> dict:
    mine, dense = result.energy
    return {
        "joules_per_1000_images": mine.joules_per_1000_images,
        "dense_joules_per_1000_images": dense.joules_per_1000_images,
        "grams_co2_per_million_images": grams_per_million(mine, settings.carbon_intensity),
        "dense_grams_co2_per_million_images": grams_per_million(dense, settings.carbon_intensity),
        "saved_share": 1 - mine.joules_per_1000_images / dense.joules_per_1000_images,
        "source": mine.energy.source,
        "measured": mine.energy.measured,
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
