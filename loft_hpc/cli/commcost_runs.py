"""What `loft commcost RUN...` prints: one sentence with the ratio, the runs' totals, and (--verify) their ledgers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loft_hpc.cli.commcost_reports import COLUMNS, IMAGES
from loft_hpc.cli.context import Report, table
from loft_hpc.cli.units import bytes_text, times_text
from loft_hpc.jobs.commcost import COUNTED, LedgerRow, RunCost, Totals
from loft_hpc.jobs.traffic_ratios import Baseline, Ratios, baselines, ratios, reference_among

FEWER, MORE = " times fewer", " times as many"
NAMES = {"loft": "LoFT", "gpipe": "GPipe", "data-parallel": "data-parallel training", "retrain": "retraining"}


def run_report(costs: Sequence[RunCost], verify: bool, format: str) -> str:
    """Runs as text. `verify`: the rows of their ledgers too; in place of the totals in csv and latex, which hold one table."""
    proof = _proof(costs)
    if verify and format != "table":
        return proof.printed(format)
    text = _totals(costs).printed(format)
    return "\n".join([text, "", table(proof.header, proof.rows), *proof.notes]) if verify else text


def run_records(costs: Sequence[RunCost]) -> dict[str, list[dict]]:
    """Runs for JSON."""
    return {
        "runs": [_run_fields(cost) for cost in costs],
        "comparisons": [_ratio_fields(one) for one in ratios(costs)],
        "predicted": [_predicted_fields(cost, one) for cost in costs for one in baselines(cost)],
    }


# -- sentences ----------------------------------------------------------------------------------------------------


def answers(costs: Sequence[RunCost]) -> list[str]:
    """A sentence for every run beside the reference, or the one of a run alone."""
    if len(costs) == 1:
        return [_alone(costs[0]), *_in_as_many_epochs(costs[0])]
    names, reference = _names(costs), reference_among(costs)
    lines = [_beside(one, names) for one in ratios(costs)]
    if len(costs) > 2:
        why = "the baseline" if reference.strategy == "gpipe" else "which handed over most"
        lines.append(f"Every run is compared with {names[reference.path]}, {why}.")
    return lines


def _names(costs: Sequence[RunCost]) -> dict[Path, str]:
    """By a run's folder: its strategy, and the folder too where two runs have the same strategy."""
    count = Counter(cost.strategy for cost in costs)
    return {cost.path: NAMES[cost.strategy] + (f" ({cost.path})" if count[cost.strategy] > 1 else "") for cost in costs}


def _beside(one: Ratios, names: dict[Path, str]) -> str:
    own, other = (bytes_text(cost.totals.handed_over_bytes) for cost in (one.run, one.reference))
    text = f"{names[one.run.path]} handed over {own}, {names[one.reference.path]} {other}"
    three = (one.handed_over, one.delivered, one.wire)
    if None not in three:
        found = [_fewer(ratio) for ratio in three]
        for direction in (FEWER, MORE):
            if all(ratio.endswith(direction) for ratio in found):  # said once
                found[1:] = [ratio.removesuffix(direction) for ratio in found[1:]]
        text += ": {}; delivered {}, on the wire {}".format(*found)
    return _sentence(f"{text}; for {_images(one.images)}")


def _fewer(ratio: float) -> str:
    """How many bytes, where the reference has `ratio` times as many."""
    if _same(ratio):
        return "as many" if ratio == 1 else "about as many"
    return f"{times_text(ratio)}{FEWER}" if ratio > 1 else f"{times_text(1 / ratio)}{MORE}"


def _images(ratio: float) -> str:
    """How many images, where the reference has one `ratio`-th."""
    if _same(ratio):
        return "as many images" if ratio == 1 else "about as many images"
    return f"{times_text(ratio)} times the images" if ratio > 1 else f"{times_text(1 / ratio)}{FEWER} images"


def _same(ratio: float) -> bool:
    """Whether a reader would take it for 1."""
    return 1 / 1.005 < ratio < 1.005


def _alone(cost: RunCost) -> str:
    """A run's totals, and what other strategies would have sent."""
    name, sent = NAMES[cost.strategy], cost.totals
    on = f"for {cost.images:,} images on {cost.workers} worker{'s' * (cost.workers > 1)}"
    if cost.workers == 1:
        return _sentence(f"{name} exchanged nothing {on}")
    text = (
        f"{name} handed over {bytes_text(sent.handed_over_bytes)} (delivered {bytes_text(sent.delivered_bytes)}, "
        f"on the wire {bytes_text(sent.wire_bytes)}) {on}"
    )
    others = " and ".join(_than(one) for one in baselines(cost) if one.handed_over_ratio is not None)
    return _sentence(f"{text}: {others} for as many images (predicted, not measured)" if others else text)


def _in_as_many_epochs(cost: RunCost) -> list[str]:
    """The same by epochs, which are fewer images for the others where every worker of LoFT goes through all of them."""
    found = [one for one in baselines(cost) if one.handed_over_ratio is not None]
    if cost.passes == 1 or not found:
        return []
    others = " and ".join(
        f"{_fewer(one.handed_over_ratio / cost.passes)} {'than' if one.handed_over_ratio > cost.passes else 'as'} {NAMES[one.strategy]}'s "
        f"{bytes_text(one.totals.handed_over_bytes / cost.passes)}"
        for one in found
    )
    return [_sentence(f"in as many epochs, which are {cost.passes} times fewer images for them: {others}")]


def _than(one: Baseline) -> str:
    fewer = _fewer(one.handed_over_ratio)
    joined = "than" if fewer.endswith(FEWER) else "as"
    return f"{fewer} {joined} {NAMES[one.strategy]}'s {bytes_text(one.totals.handed_over_bytes)}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# -- tables -------------------------------------------------------------------------------------------------------


def _totals(costs: Sequence[RunCost]) -> Report:
    header = ["run", "strategy", "workers", "handed over", "delivered", "on the wire", "besides", "images", "per image"]
    rows = [
        [
            str(cost.path), cost.strategy, str(cost.workers),
            *(bytes_text(size) for size in (*asdict(cost.totals).values(), cost.besides.delivered_bytes)),
            f"{cost.images:,}", bytes_text(cost.handed_over_bytes_per_image),
        ]
        for cost in costs
    ]  # fmt: skip
    names = _names(costs)
    notes = [
        f"More than the strategy differs: the {name} of {names[one.run.path]} is {mine}, of {names[one.reference.path]} {theirs}."
        for one in ratios(costs)
        for name, mine, theirs in one.other_differences
    ]
    if len(costs) == 1:
        notes += [f"Predicted by the closed formula: {NAMES[one.strategy]} {one.how}." for one in baselines(costs[0])]
    wrong = [str(cost.path) for cost in costs if not cost.equal]
    notes += [
        *COLUMNS,
        "besides: delivered at the start, for evaluations, snapshots and checkpoints; in no other column.",
        f"{IMAGES} per image: bytes handed over for each.",
        f"NOT equal to the closed formula, so not to be quoted: the ledger of {', '.join(wrong)}."
        if wrong
        else "Every ledger equals the closed formula to the byte (--verify prints it row by row).",
    ]
    return Report(header, rows, [_total_fields(cost) for cost in costs], notes, answers(costs))


def _proof(costs: Sequence[RunCost]) -> Report:
    """Every row of the ledgers beside the formula, in bytes."""
    sides = [f"{name}: {side}" for name in ("handed over", "delivered", "wire") for side in ("formula", "ledger")]
    header = ["run", "operation", "purpose", *sides, ""]
    rows, records = [], []
    for cost in costs:
        for row in cost.rows:
            pairs = zip(*(asdict(Totals.of_entries([side])).values() for side in (row.formula, row.ledger)), strict=True)
            rows.append(
                [
                    str(cost.path), row.operation, row.purpose, *(f"{value:,}" for pair in pairs for value in pair),
                    "equal" if row.equal else "DIFFERENT",
                ]
            )  # fmt: skip
            records.append(
                {"path": str(cost.path), "strategy": cost.strategy, "workers": cost.workers}
                | {key: value for key, value in _row_fields(row).items() if not isinstance(value, dict)}
                | {f"{side}_{name}": value for side in ("formula", "ledger") for name, value in _row_fields(row)[side].items()}
            )
    notes = [
        "Bytes, all workers together. In no formula: "
        + "; ".join(f"{cost.control.payload_sent_bytes:,} of control in {cost.path}" for cost in costs)
        + "."
    ]
    return Report(header, rows, records, notes)


def _row_fields(row: LedgerRow) -> dict:
    sides = {side: {name: getattr(getattr(row, side), name) for name in COUNTED} for side in ("formula", "ledger")}
    return {"operation": row.operation, "purpose": row.purpose, "equal": row.equal, **sides}


def _total_fields(cost: RunCost) -> dict:
    return {
        "path": str(cost.path),
        "strategy": cost.strategy,
        "workers": cost.workers,
        "steps": cost.steps,
        "rounds": cost.rounds,
        "images": cost.images,
        **asdict(cost.totals),
        "besides_delivered_bytes": cost.besides.delivered_bytes,
        "handed_over_bytes_per_image": cost.handed_over_bytes_per_image,
    }


def _run_fields(cost: RunCost) -> dict:
    return _total_fields(cost) | {
        "formula_bytes": cost.formula_totals.handed_over_bytes,
        "ledger_bytes": cost.totals.handed_over_bytes,
        "control_bytes": cost.control.payload_sent_bytes,
        "operations": [_row_fields(row) for row in cost.rows],
    }


def _ratio_fields(one: Ratios) -> dict:
    return {
        "path": str(one.run.path),
        "reference_path": str(one.reference.path),
        "handed_over_bytes_ratio": one.handed_over,
        "delivered_bytes_ratio": one.delivered,
        "wire_bytes_ratio": one.wire,
        "images_ratio": one.images,
    }


def _predicted_fields(cost: RunCost, one: Baseline) -> dict:
    return {
        "path": str(cost.path),
        "strategy": one.strategy,
        "how": one.how,
        "workers": cost.workers,
        "images": cost.images,
        **asdict(one.totals),
        "handed_over_bytes_ratio": one.handed_over_ratio,
    }
