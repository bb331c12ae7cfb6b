"""`loft commcost`."""

from dataclasses import asdict
from pathlib import Path

import click

from loft_hpc.analysis.commcost import PosterRow, poster_table
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.jobs.commcost import RunCost, run_cost


@click.command("commcost")
@click.argument("runs", metavar="[RUN...]", nargs=-1, type=click.Path())
@format_option
@click.pass_context
def command(context: click.Context, runs: tuple[str, ...], format: str) -> None:
    """The poster's communication-cost column, recomputed; or, for LoFT runs, the formula beside the run's byte ledger.

    cost(S) = 4 bytes * R * (P + S * C): P partitioned and C shared parameters, S workers, R transfers (for a run: its rounds).
    """
    job: Job = context.obj
    job.join()
    if runs:
        costs = [run_cost(Path(run)) for run in runs]
        job.show(format, {"runs": [_run_fields(cost) for cost in costs]}, _run_table(costs))
    else:
        rows = poster_table()
        job.show(format, {"poster": [_poster_fields(row) for row in rows]}, _poster_table(rows))


def _poster_table(rows: list[PosterRow]) -> str:
    header = ["network (hidden width x2)", "S", "P", "C", "R", "formula", "printed", "difference", "GPipe / LoFT", "printed", ""]
    lines = [
        [
            f"{row.cell.model} {row.cell.dataset}",
            str(row.cell.workers),
            f"{row.divided.partitioned:,}",
            f"{row.divided.shared:,}",
            str(row.cell.transfers),
            f"{row.gigabytes:.4f}G",
            f"{row.cell.printed_gigabytes:.2f}G",
            f"{row.difference_gigabytes:+.4f}G",
            f"{row.improvement:.2f}x",
            f"{row.cell.improvement_printed:.2f}x",
            "misprint" if row.misprint else "",
        ]
        for row in rows
    ]
    worst = max(abs(row.difference_gigabytes) for row in rows)
    notes = [
        "G: 10^9 bytes. formula: 4 bytes * R * (P + S * C), what S workers hand over in R transfers.",
        f"Largest difference from the printed cells: {worst:.4f}G.",
    ]
    notes += [
        f"misprint: {row.cell.model} on {row.cell.dataset} with {row.cell.workers} workers is printed {row.cell.improvement_printed:.2f}x, but "
        f"{row.cell.gpipe_printed_gigabytes:.2f}G / {row.cell.printed_gigabytes:.2f}G = {row.improvement:.2f}x."
        for row in rows
        if row.misprint
    ]
    return "\n".join([table(header, lines), *notes])


def _poster_fields(row: PosterRow) -> dict:
    return {
        **asdict(row.cell),
        "partitioned_parameters": row.divided.partitioned,
        "shared_parameters": row.divided.shared,
        "formula_gigabytes": row.gigabytes,
        "difference_gigabytes": row.difference_gigabytes,
        "improvement": row.improvement,
        "misprint": row.misprint,
    }


def _run_table(costs: list[RunCost]) -> str:
    header = ["run", "S", "P", "C", "rounds", "formula bytes", "ledger bytes", "difference"]
    lines = [
        [
            str(cost.path),
            str(cost.workers),
            f"{cost.divided.partitioned:,}",
            f"{cost.divided.shared:,}",
            str(cost.rounds),
            f"{cost.formula_bytes:,}",
            f"{cost.ledger_bytes:,}",
            f"{cost.ledger_bytes - cost.formula_bytes:+,}",
        ]
        for cost in costs
    ]
    return table(header, lines)


def _run_fields(cost: RunCost) -> dict:
    return {
        "path": str(cost.path),
        "workers": cost.workers,
        "rounds": cost.rounds,
        "partitioned_parameters": cost.divided.partitioned,
        "shared_parameters": cost.divided.shared,
        "formula_bytes": cost.formula_bytes,
        "ledger_bytes": cost.ledger_bytes,
    }
