"""`loft theory`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, Report
from loft_hpc.cli.options import default, engine_option, fill, option, plot_option
from loft_hpc.jobs.theory import TERMS, Theory, TheorySettings, check_theorem
from loft_hpc.jsontext import finite_or_none


def _several(name: str, help: str) -> Any:
    values = default(TheorySettings, name)
    return click.option(f"--{name}", multiple=True, type=click.IntRange(1), default=values, show_default=True, help=help)


@click.command("theory")
@_several("filters", "Hidden filters m of the network (repeat for more).")
@_several("workers", "Workers S that the filters are partitioned over (repeat for more).")
@option(TheorySettings, "images", "Images n, of digits.", type=int)
@option(TheorySettings, "patch_size", "Pixels per side of a patch.", type=int)
@option(TheorySettings, "steps", "Steps T of both trajectories.", type=int)
@option(TheorySettings, "eta", "Step size.  [default: 0.5 / the largest eigenvalue of the kernel]", type=float)
@option(TheorySettings, "local_iterations", "Steps between two partitions.", type=int)
@option(TheorySettings, "kappa", "Standard deviation of the initial filters.", type=float)
@option(TheorySettings, "starts", "Initialisations, for the error bars.", type=int)
@option(TheorySettings, "deals", "Sequences of partitions that each start is averaged over.", type=int)
@option(TheorySettings, "seed", "Decides initialisations and partitions.", type=int)
@engine_option
@plot_option("spread, drift and outputs over m, for every S above 1.")
@click.option(
    "--format", type=click.Choice(["table", "json", "csv", "latex"]), default="table", show_default=True, help="How results are printed."
)
@click.pass_context
def command(context: click.Context, plot: Path | None, format: str, **options: Any) -> None:
    """Check LoFT's Theorem 1 numerically: how far LoFT's trajectory is from gradient descent's, over grids of m and S.

    Trains the theorem's own model (one hidden convolutional layer, only its filters trained, ReLU, fixed output weights, squared loss)
    both ways from the same start, in float64. Under mpirun the ranks share the grid; the figures stay the same.

    Example: mpirun -np 2 loft theory --plot theory.png
    """
    job: Job = context.obj
    settings = fill(TheorySettings, options)
    job.join()
    found = check_theorem(settings, job.world)
    if plot:
        from loft_hpc.analysis.plots import plot_theory

        job.once(lambda: plot_theory(found.cells, plot))
    report = _report(found, settings)
    fields = {
        **{name: getattr(found, name) for name in ("lambda_min", "lambda_max", "eta", "theorem_eta")},
        "settings": asdict(settings), "cells": list(report.records), "slopes": [{name: finite_or_none(value) for name, value in asdict(slope).items()} for slope in found.slopes],
        "remarks": found.remarks,
    }  # fmt: skip
    job.show(format, fields, report.printed(format))


def _report(found: Theory, settings: TheorySettings) -> Report:
    rows, records = [], []
    for filters in settings.filters:
        for workers in settings.workers:
            terms = {term: found.mean(filters, workers, term) for term in TERMS}
            rows.append([str(filters), str(workers), *(f"{mean:.3e} +- {half:.0e}" for mean, half in terms.values())])
            record: dict[str, Any] = {"filters": filters, "workers": workers}
            for term, (mean, half) in terms.items():
                record |= {term: finite_or_none(mean), f"{term}_half_width_95": finite_or_none(half)}
            records.append(record)
    slopes = [
        f"S = {slope.workers}: {slope.term} goes as m^({slope.exponent:+.3f} +- {slope.half_width:.3f})"
        for slope in found.slopes
    ]  # fmt: skip
    notes = [
        f"eta = {found.eta:.3g}, lambda_0 = {found.lambda_min:.3g}, lambda_max = {found.lambda_max:.3g}; +- is the 95 % interval over "
        f"{settings.starts} initialisations",
        *slopes, *found.remarks,
    ]  # fmt: skip
    header = ["m", "S", "||W - W^||^2", "of it spread", "and drift", "eta sum ||f - f^||^2", "left-hand side"]
    return Report(header, rows, records, notes)
