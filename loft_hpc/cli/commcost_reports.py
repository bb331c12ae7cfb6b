"""What `loft commcost` prints without a run: the poster's table and cases, each for people and for programs."""

from loft_hpc.analysis.poster import PosterRow
from loft_hpc.analysis.timing import Cluster
from loft_hpc.cli.context import Report
from loft_hpc.cli.units import bytes_text, times_text
from loft_hpc.jobs.prediction import Prediction, winners
from loft_hpc.jobs.pretrain import PretrainSettings

COLUMNS = [
    "handed over: what the workers put into the exchanges of rounds and steps, each worker's part counted once. "
    "The LoFT poster's table counts this way, and it is where LoFT looks best: say so, and give one of the others beside it.",
    "delivered: what the workers receive from these exchanges. An all-gather brings every part to every worker, so this is more.",
    "on the wire: what the workers send over the network for them, all-reduces and all-gathers being rings (docs/communication.md).",
]
"""The three ways to count, for every table of this command."""
IMAGES = "images: training images of all workers together, those of every repetition counted."


def title(settings: PretrainSettings) -> str:
    widen = f" x{settings.widen:g}" if settings.widen else ""
    loft = settings.loft
    return (
        f"{settings.model}{widen} on {settings.data.dataset}, {settings.epochs} epochs, batch {settings.batch_size}; "
        f"loft: {loft.partition}, {loft.exchange}, {loft.transport_dtype}, {loft.local_iterations} local iterations"
        + (f", averaged every {loft.average_every}" if loft.average_every > 1 else "")
    )


def case_report(predictions: list[Prediction], settings: PretrainSettings, cluster: Cluster | None) -> Report:
    header = ["strategy", "workers", "handed over", "delivered", "on the wire", "images"]
    if cluster:
        header += ["s/epoch", "computing", "not hidden", ""]
    best = winners(predictions)
    rows, records = [], []
    for prediction in predictions:
        row = [prediction.strategy, str(prediction.workers)]
        seconds = prediction.seconds_per_epoch
        if prediction.impossible:
            row += ["-"] * 4 + (["-", "-", "-", ""] if cluster else [])
        else:
            sizes = (prediction.handed_over_bytes, prediction.delivered_bytes, prediction.wire_bytes)
            row += [*map(bytes_text, sizes), f"{prediction.images:,}"]
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
                "images": None if prediction.impossible else prediction.images,
                "epoch_seconds": seconds and seconds.total,
                "epoch_compute_seconds": seconds and seconds.compute,
                "epoch_not_hidden_seconds": seconds and seconds.communicate,
                "impossible": prediction.impossible or None,
            }
        )
    notes = [title(settings) + ".", *_how_many_times_fewer(predictions, settings)]
    notes += [
        "By the closed formulas: all workers together, over the whole training, without its start, evaluations and checkpoints.",
        *COLUMNS,
        IMAGES,
    ]
    strategies = {prediction.strategy for prediction in predictions if not prediction.impossible}
    if "loft" in strategies and len(strategies) > 1 and not settings.loft.shard_data:
        notes += ["In an epoch every worker of loft sees all images (--shard-data: a shard); the workers of the others share them."]
    if cluster:
        notes += [
            f"Times: alpha-beta model of {cluster.name} ({cluster.described}).",
            *_where_each_wins(best),
        ]  # fmt: skip
    reasons: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.impossible:
            reasons.setdefault(prediction.strategy, []).append(prediction)
    for strategy, missing in reasons.items():
        numbers = ", ".join(str(prediction.workers) for prediction in missing)
        notes += [f"-: {strategy} cannot run on {numbers} workers: {missing[0].impossible}"]
    return Report(header, rows, records, notes)


def _how_many_times_fewer(predictions: list[Prediction], settings: PretrainSettings) -> list[str]:
    """LoFT beside each of the others, handed over, for every number of workers that both can have."""
    possible = {(one.strategy, one.workers): one.handed_over_bytes for one in predictions if not one.impossible and one.handed_over_bytes}
    lines = []
    for workers in dict.fromkeys(workers for strategy, workers in possible if strategy == "loft"):
        found = [
            (name, possible[name, workers] / possible["loft", workers])
            for name in ("gpipe", "data-parallel")
            if (name, workers) in possible
        ]
        if not found:
            continue
        passes = 1 if settings.loft.shard_data else workers
        told = " and ".join(_than(ratio, name) for name, ratio in found)
        more = f"; for as many images, {' and '.join(_than(passes * ratio, name) for name, ratio in found)}" if passes > 1 else ""
        lines.append(f"{workers} workers: in as many epochs, LoFT hands over {told}{more}.")
    return lines


def _than(ratio: float, name: str) -> str:
    return f"{times_text(ratio)} times fewer bytes than {name}" if ratio >= 1 else f"{times_text(1 / ratio)} times as many as {name}"


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
            _gigabytes(row.gpipe_gigabytes),
            _gigabytes(row.cell.gpipe_printed_gigabytes),
            f"{100 * row.gpipe_unexplained:+.2f} %",
            _gigabytes(row.loft_gigabytes),
            _gigabytes(row.cell.loft_printed_gigabytes),
            bytes_text(1e9 * row.loft_difference_gigabytes),
            f"{row.improvement:.2f}x",
            f"{row.printed_quotient:.2f}x",
            f"{row.cell.improvement_printed:.2f}x",
            "misprint" if row.misprint else "",
        ]
        for row in rows
    ]
    worst = max(abs(row.loft_difference_gigabytes) for row in rows)
    notes = [
        "Bytes handed over, all workers together, in the poster's unit: 1 GB is 10^9 bytes.",
        "LoFT: 4 bytes * R * (P + S * C), R transfers (500 on CIFAR, 6000 on ImageNet).",
        f"Largest difference of LoFT from the printed cells: {bytes_text(1e9 * worst)}.",
        "GPipe: 2 * 4 bytes * images * epochs * elements at the cuts (10 epochs on CIFAR, 20 on ImageNet). Cuts: after stage 2; after stages 1, 2, 3.",
    ]
    notes += [
        f"{row.cell.setting.model} on {row.cell.setting.dataset}, {row.cell.workers} workers: cuts after blocks "
        f"{', '.join(map(str, row.cell.setting.cuts[row.cell.workers]))} fit; after the stages it would be "
        f"{_gigabytes(row.gpipe_at_stages_gigabytes)}."
        for row in rows
        if row.gpipe_at_stages_gigabytes != row.gpipe_gigabytes
    ]
    notes += [
        f"misprint: {row.cell.setting.model} on {row.cell.setting.dataset} with {row.cell.workers} workers is printed {row.cell.improvement_printed:.2f}x, "
        f"but {_gigabytes(row.cell.gpipe_printed_gigabytes)} / {_gigabytes(row.cell.loft_printed_gigabytes)} = {row.printed_quotient:.2f}x."
        for row in rows
        if row.misprint
    ]
    return Report(header, lines, [_poster_fields(row) for row in rows], notes)


def _gigabytes(number: float) -> str:
    return bytes_text(1e9 * number, "GB", 2)


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
