"""What `loft commcost` prints: the poster's table, cases, and runs, each for people and for programs."""

from dataclasses import asdict

from loft_hpc.analysis.poster import PosterRow
from loft_hpc.analysis.timing import Cluster
from loft_hpc.cli.context import Report
from loft_hpc.jobs.commcost import LedgerRow, RunCost
from loft_hpc.jobs.prediction import Prediction, winners
from loft_hpc.jobs.pretrain import PretrainSettings


def title(settings: PretrainSettings) -> str:
    widen = f" x{settings.widen:g}" if settings.widen else ""
    loft = settings.loft
    return (
        f"{settings.model}{widen} on {settings.data.dataset}, {settings.epochs} epochs, batch {settings.batch_size}; "
        f"loft: {loft.partition}, {loft.exchange}, {loft.transport_dtype}, {loft.local_iterations} local iterations"
        + (f", averaged every {loft.average_every}" if loft.average_every > 1 else "")
    )


def case_report(predictions: list[Prediction], settings: PretrainSettings, cluster: Cluster | None) -> Report:
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
    notes = [title(settings) + "."]
    notes += ["G: 10^9 bytes, all workers together, over the whole training without evaluations. delivered: payload that reaches workers."]
    if cluster:
        notes += [
            f"Times: alpha-beta model of {cluster.name} ({cluster.described}).",
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


def poster_report(rows: list[PosterRow]) -> Report:
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


def run_report(costs: list[RunCost]) -> Report:
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


def _row_fields(row: LedgerRow) -> dict:
    wanted = ("payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes", "wire_received_bytes")
    sides = {side: {name: value for name, value in asdict(getattr(row, side)).items() if name in wanted} for side in ("formula", "ledger")}
    return {"operation": row.operation, "purpose": row.purpose, "equal": row.equal, **sides}


def run_fields(cost: RunCost) -> dict:
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
