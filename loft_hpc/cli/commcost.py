"""`loft commcost`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from loft_hpc.analysis.poster import PosterRow, poster_table
from loft_hpc.analysis.timing import EXAMPLES, Cluster
from loft_hpc.cli.context import Job, Report
from loft_hpc.cli.options import fill, option, several, typed
from loft_hpc.cli.pretrain import loft_options, pipeline_options
from loft_hpc.data.registry import DATASET_NAMES, DataSettings, known_shape
from loft_hpc.filterwise.loft import LoftSettings
from loft_hpc.jobs.commcost import Prediction, RunCost, predict, run_cost, winners, with_strategy
from loft_hpc.jobs.pretrain import STRATEGIES, PretrainSettings
from loft_hpc.models.architecture import MODEL_NAMES
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.training.settings import Computation, Evaluation, Optimisation

WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _workers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in value.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 2:
        raise click.BadParameter(f"{value} is no list of numbers of workers, from 2 on: as in 2,4,8")
    return numbers


case_options = several(
    option(PretrainSettings, "model", "Residual network.", type=click.Choice(MODEL_NAMES), metavar="MODEL"),
    option(PretrainSettings, "widen", "Hidden filters as a multiple of the stage's width.  [default: 2 for wideresnet, else 1]", type=float),
    click.option("--dataset", type=click.Choice(DATASET_NAMES), default="cifar10", show_default=True, help="Data set (not read: its shape counts)."),
    click.option("--image-size", type=click.IntRange(8), help="Pixels per side.  [default: the data set's own]"),
    option(PretrainSettings, "epochs", "Walks through the training images, per worker.", type=int),
    option(PretrainSettings, "rounds", "Rounds of LoFT, in place of those that the epochs make.", type=int),
    option(PretrainSettings, "batch_size", "Images per step: of each worker under loft, of all together under data-parallel and gpipe.", type=int),
    click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES), default=STRATEGIES, help="Repeat for more.  [default: all]"),
    click.option("--workers", callback=_workers, default=",".join(map(str, WORKERS)), show_default=True, help="Numbers of workers."),
    loft_options,
    pipeline_options,
)  # fmt: skip


@click.command("commcost")
@click.argument("runs", metavar="[RUN...]", nargs=-1, type=click.Path())
@case_options
@click.option(
    "--cluster", "cluster_name", metavar="FILE",
    help=f"TOML file of a cluster, or an example ({', '.join(sorted(file.stem for file in EXAMPLES.glob('*.toml')))}): predicts times too.",
)  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw bytes (and times) over workers.")
@click.option(
    "--format", type=click.Choice(["table", "json", "csv", "latex"]), default="table", show_default=True, help="How results are printed."
)
@click.pass_context
def command(
    context: click.Context, runs: tuple[str, ...], strategies: tuple[str, ...], workers: tuple[int, ...], cluster_name: str | None,
    plot: str | None, format: str, **options: Any,
) -> None:  # fmt: skip
    """What training costs in communication: the poster's table, any case, or the ledgers of real runs beside the formulas.

    With nothing given, the poster's column is recomputed: GPipe and LoFT, printed and by formula. With options of a case, the bytes
    that each strategy sends over the whole training, and with --cluster the seconds of an epoch by an alpha-beta model. With the
    folders of pretraining runs, every run's byte ledger beside the closed formula for that run.

    \b
    Examples: loft commcost
              loft commcost --model preresnet34 --widen 2 --workers 2,4 --exchange alltoall --partition all-blocks
              loft commcost --cluster ethernet-1g --plot cost.png
              loft commcost runs/RUN
    """
    job: Job = context.obj
    job.join()
    chosen = typed(context) - {"format", "runs"}
    if runs:
        if chosen:
            raise click.UsageError("options of a case say nothing about a run: give runs or options")
        costs = [run_cost(Path(run)) for run in runs]
        _show(job, format, "runs", _run_report(costs), [_run_fields(cost) for cost in costs])
    elif chosen:
        _case(job, strategies, workers, cluster_name, plot, format, options)
    else:
        report = _poster_report(poster_table())
        _show(job, format, "poster", report, list(report.records))


def _show(job: Job, format: str, name: str, report: Report, fields: list[dict]) -> None:
    job.show(format, {name: fields}, report.printed(format))


def _case(
    job: Job, strategies: Sequence[str], workers: Sequence[int], cluster_name: str | None, plot: str | None, format: str, options: dict
) -> None:
    settings = fill(
        PretrainSettings,
        options,
        strategy="loft",
        seed=0,
        snapshot_every=0,
        data=DataSettings(dataset=options["dataset"], image_size=options["image_size"]),
        loft=fill(LoftSettings, options),
        pipeline=fill(PipelineSettings, options),
        optimisation=Optimisation(),
        evaluation=Evaluation(),
        computation=Computation(),
    )
    known_shape(settings.data.dataset, settings.data.image_size)
    cluster = Cluster.read(cluster_name) if cluster_name else None
    cases = {
        name: with_strategy(replace(settings, rounds=settings.rounds if name == "loft" else None), name)
        for name in dict.fromkeys(strategies)
    }
    predictions = [predict(case, number, cluster) for number in workers for case in cases.values()]
    if plot and job.speaks:
        from loft_hpc.analysis.plots import plot_costs

        plot_costs(predictions, Path(plot), _title(settings), cluster.name if cluster else None)
    report = _case_report(predictions, settings, cluster)
    _show(job, format, "cases", report, list(report.records))


def _title(settings: PretrainSettings) -> str:
    widen = f" x{settings.widen:g}" if settings.widen else ""
    loft = settings.loft
    return (
        f"{settings.model}{widen} on {settings.data.dataset}, {settings.epochs} epochs, batch {settings.batch_size}; "
        f"loft: {loft.partition}, {loft.exchange}, {loft.transport_dtype}, {loft.local_iterations} local iterations"
        + (f", averaged every {loft.average_every}" if loft.average_every > 1 else "")
    )


def _case_report(predictions: list[Prediction], settings: PretrainSettings, cluster: Cluster | None) -> Report:
    header = ["strategy", "workers", "delivered", "handed over", "on the wire"]
    if cluster:
        header += ["s/epoch", "computing", "not hidden", ""]
    best = winners(predictions)
    rows, records = [], []
    for prediction in predictions:
        row = [prediction.strategy, str(prediction.workers)]
        seconds = prediction.seconds_per_epoch
        if prediction.impossible:
            row += ["-", "-", "-"] + (["-", "-", "-", ""] if cluster else [])
        else:
            row += [f"{size / 1e9:.2f}G" for size in (prediction.delivered_bytes, prediction.handed_over_bytes, prediction.wire_bytes)]
            if seconds:
                shortest = (
                    "shortest" if best[prediction.workers] == prediction.strategy and len({p.strategy for p in predictions}) > 1 else ""
                )
                row += [f"{seconds.total:.4g}", f"{seconds.compute:.4g}", f"{seconds.communicate:.4g}", shortest]
        rows.append(row)
        records.append(
            {
                "strategy": prediction.strategy,
                "workers": prediction.workers,
                "delivered_bytes": None if prediction.impossible else prediction.delivered_bytes,
                "handed_over_bytes": None if prediction.impossible else prediction.handed_over_bytes,
                "wire_bytes": None if prediction.impossible else prediction.wire_bytes,
                "epoch_seconds": seconds and seconds.total,
                "epoch_compute_seconds": seconds and seconds.compute,
                "epoch_not_hidden_seconds": seconds and seconds.communicate,
                "impossible": prediction.impossible or None,
            }
        )
    notes = [_title(settings) + "."]
    notes += ["G: 10^9 bytes, all workers together, over the whole training without evaluations. delivered: payload that reaches workers."]
    if cluster:
        notes += [
            f"Times: alpha-beta model of {cluster.name} ({cluster.latency_seconds:g} s, {cluster.bandwidth_bytes_per_second:g} bytes/s, {cluster.flops_per_second:g} FLOP/s per worker).",
            *_where_each_wins(best),
        ]  # fmt: skip
        if "loft" in best.values() and not settings.loft.shard_data:
            notes += [
                "An epoch of loft is every worker's own walk through all images (--shard-data: a shard); of the others, one walk of all together."
            ]
    reasons: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.impossible:
            reasons.setdefault(prediction.strategy, []).append(prediction)
    for strategy, missing in reasons.items():
        numbers = ", ".join(str(prediction.workers) for prediction in missing)
        notes += [f"-: {strategy} cannot run on {numbers} workers: {missing[0].impossible}"]
    return Report(header, rows, records, notes)


def _where_each_wins(best: dict[int, str]) -> list[str]:
    """One line for each strategy that is the fastest somewhere."""
    return [
        f"Shortest epoch with {strategy}: {', '.join(str(workers) for workers, name in best.items() if name == strategy)} workers."
        for strategy in dict.fromkeys(best.values())
    ]


def _poster_report(rows: list[PosterRow]) -> Report:
    header = [
        "network (hidden width x2)", "S", "GPipe formula", "printed", "unexplained", "LoFT formula", "printed", "difference",
        "GPipe / LoFT", "of printed", "printed", "",
    ]  # fmt: skip
    lines = [
        [
            f"{row.cell.setting.model} {row.cell.setting.dataset}",
            str(row.cell.workers),
            f"{row.gpipe_gigabytes:.2f}G",
            f"{row.cell.gpipe_printed_gigabytes:.2f}G",
            f"{100 * row.gpipe_unexplained:+.2f} %",
            f"{row.loft_gigabytes:.4f}G",
            f"{row.cell.loft_printed_gigabytes:.2f}G",
            f"{row.loft_difference_gigabytes:+.4f}G",
            f"{row.improvement:.2f}x",
            f"{row.printed_quotient:.2f}x",
            f"{row.cell.improvement_printed:.2f}x",
            "misprint" if row.misprint else "",
        ]
        for row in rows
    ]
    worst = max(abs(row.loft_difference_gigabytes) for row in rows)
    notes = [
        "G: 10^9 bytes. LoFT: 4 bytes * R * (P + S * C), what S workers hand over in R transfers (500 on CIFAR, 6000 on ImageNet).",
        f"Largest difference of LoFT from the printed cells: {worst:.4f}G.",
        "GPipe: 2 * 4 bytes * images * epochs * elements at the cuts (10 epochs on CIFAR, 20 on ImageNet). Cuts: after stage 2; after stages 1, 2, 3.",
    ]
    notes += [
        f"{row.cell.setting.model} on {row.cell.setting.dataset}, {row.cell.workers} workers: cuts after blocks "
        f"{', '.join(map(str, row.cell.setting.cuts[row.cell.workers]))} fit; after the stages it would be {row.gpipe_at_stages_gigabytes:.2f}G."
        for row in rows
        if row.gpipe_at_stages_gigabytes != row.gpipe_gigabytes
    ]
    notes += [
        f"misprint: {row.cell.setting.model} on {row.cell.setting.dataset} with {row.cell.workers} workers is printed {row.cell.improvement_printed:.2f}x, "
        f"but {row.cell.gpipe_printed_gigabytes:.2f}G / {row.cell.loft_printed_gigabytes:.2f}G = {row.printed_quotient:.2f}x."
        for row in rows
        if row.misprint
    ]
    return Report(header, lines, [_poster_fields(row) for row in rows], notes)


def _poster_fields(row: PosterRow) -> dict:
    setting = row.cell.setting
    return {
        "model": setting.model,
        "dataset": setting.dataset,
        "workers": row.cell.workers,
        "transfers": setting.transfers,
        "epochs": setting.epochs,
        "partitioned_parameters": row.divided.partitioned,
        "shared_parameters": row.divided.shared,
        "gpipe_cut_after_blocks": ",".join(map(str, setting.cuts[row.cell.workers])),
        "gpipe_formula_gigabytes": row.gpipe_gigabytes,
        "gpipe_at_stages_gigabytes": row.gpipe_at_stages_gigabytes,
        "gpipe_printed_gigabytes": row.cell.gpipe_printed_gigabytes,
        "gpipe_difference_gigabytes": row.gpipe_difference_gigabytes,
        "gpipe_unexplained": row.gpipe_unexplained,
        "loft_formula_gigabytes": row.loft_gigabytes,
        "loft_printed_gigabytes": row.cell.loft_printed_gigabytes,
        "loft_difference_gigabytes": row.loft_difference_gigabytes,
        "improvement": row.improvement,
        "improvement_of_printed": row.printed_quotient,
        "improvement_printed": row.cell.improvement_printed,
        "misprint": row.misprint,
    }


def _run_report(costs: list[RunCost]) -> Report:
    header = ["run", "strategy", "S", "operation", "purpose", "delivered: formula", "ledger", "wire: formula", "ledger", ""]
    rows, records = [], []
    for cost in costs:
        for row in cost.rows:
            pairs = [
                (row.formula.payload_received_bytes, row.ledger.payload_received_bytes),
                (row.formula.wire_sent_bytes, row.ledger.wire_sent_bytes),
            ]
            rows.append(
                [
                    str(cost.path), cost.strategy, str(cost.workers), row.operation, row.purpose,
                    *(f"{value:,}" for pair in pairs for value in pair), "equal" if row.equal else "DIFFERENT",
                ]
            )  # fmt: skip
            records.append(
                {"path": str(cost.path), "strategy": cost.strategy, "workers": cost.workers}
                | {key: value for key, value in _row_fields(row).items() if not isinstance(value, dict)}
                | {f"{side}_{name}": value for side in ("formula", "ledger") for name, value in _row_fields(row)[side].items()}
            )
    notes = [f"{cost.path}: {cost.ledger_bytes:,} bytes handed over in exchanges, {cost.formula_bytes:,} by the formula." for cost in costs]
    notes += [
        "Bytes, all ranks together. Not in the formulas: "
        + "; ".join(f"{cost.control_bytes:,} of control in {cost.path}" for cost in costs)
        + "."
    ]
    return Report(header, rows, records, notes)


def _row_fields(row) -> dict:
    wanted = ("payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes", "wire_received_bytes")
    sides = {side: {name: value for name, value in asdict(getattr(row, side)).items() if name in wanted} for side in ("formula", "ledger")}
    return {"operation": row.operation, "purpose": row.purpose, "equal": row.equal, **sides}


def _run_fields(cost: RunCost) -> dict:
    return {
        "path": str(cost.path),
        "strategy": cost.strategy,
        "workers": cost.workers,
        "steps": cost.steps,
        "rounds": cost.rounds,
        "formula_bytes": cost.formula_bytes,
        "ledger_bytes": cost.ledger_bytes,
        "control_bytes": cost.control_bytes,
        "operations": [_row_fields(row) for row in cost.rows],
    }
