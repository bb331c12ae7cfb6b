"""`loft commcost RUN...`: the ledgers of real runs beside the closed formulas."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path

from loft_hpc.analysis.size import network_size
from loft_hpc.analysis.traffic import (
    FLOAT32_BYTES,
    Division,
    Flow,
    all_gather,
    as_ledger,
    broadcast,
    crossing_elements,
    data_parallel_step,
    delivered,
    handed_over,
    pipeline_step,
)
from loft_hpc.comm.ledger import Entry, Ledger
from loft_hpc.data.registry import IMAGE_SIZES
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.partition import check_workers, deal, leaving
from loft_hpc.jobs.cost import seen_by
from loft_hpc.jobs.prediction import averaging_rounds, division_of, exchange_flows, round_ends
from loft_hpc.jobs.pretrain import PretrainSettings, settings_of
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.pipeline.stages import cuts
from loft_hpc.runs.run import Run
from loft_hpc.training.calendar import Calendar

TRAINING = ("partitioned", "shared", "activation", "gradient", "merge")
"""Purposes that the formulas speak of; `control` holds what their sizes do not decide (objects, statistics of evaluations)."""
MOST_POINTS = 1_000_000
"""The formulas go through a run round by round."""


COUNTED = ("payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes", "wire_received_bytes")
"""The columns of a ledger that the formulas say."""


@dataclass(frozen=True)
class LedgerRow:
    """One operation and purpose of a run, all ranks together: what the formula says and what the ledger says."""

    operation: str
    purpose: str
    formula: Entry
    ledger: Entry

    @property
    def different(self) -> list[str]:
        """The columns in which they differ."""
        return [name for name in COUNTED if getattr(self.formula, name) != getattr(self.ledger, name)]

    @property
    def equal(self) -> bool:
        return not self.different


@dataclass(frozen=True)
class Totals:
    """Bytes of some exchanges, all ranks together, as docs/communication.md counts them."""

    handed_over_bytes: int
    delivered_bytes: int
    wire_bytes: int

    @classmethod
    def of_entries(cls, entries: Sequence[Entry]) -> "Totals":
        columns = ("payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes")
        return cls(*(sum(getattr(entry, column) for entry in entries) for column in columns))

    @classmethod
    def of_flows(cls, flows: Sequence[Flow]) -> "Totals":
        return cls(handed_over(flows), delivered(flows), sum(flow.wire_bytes for flow in flows))


@dataclass(frozen=True)
class RunCost:
    """A run's ledger beside the closed formula."""

    path: Path
    strategy: str
    """One of `jobs.pretrain.STRATEGIES`, or `retrain`."""
    workers: int
    steps: int
    """Steps of a worker."""
    rounds: int | None
    images: int
    """Training images of all workers together, those of every repetition counted."""
    passes: int
    """Passes over the training images in an epoch, all workers together: one for each LoFT worker (with --shard-data one in all)."""
    network: Architecture
    parameters: int
    """Trainable parameters; with a mask of weights, all of them, since all travel."""
    data: str
    image_size: int
    rows: list[LedgerRow]
    control: Entry
    """What the formulas do not speak of."""

    @property
    def exchanged(self) -> list[LedgerRow]:
        """What the steps and rounds exchange: without the start's broadcasts and without merges."""
        return [row for row in self.rows if row.operation != "broadcast" and row.purpose != "merge"]

    @property
    def totals(self) -> Totals:
        """Bytes of the exchanges of steps and rounds, by the ledger."""
        return Totals.of_entries([row.ledger for row in self.exchanged])

    @property
    def besides(self) -> Totals:
        """All else in the ledger: the start, merges for evaluations, snapshots and checkpoints, and `control`."""
        exchanged = self.exchanged
        return Totals.of_entries([*(row.ledger for row in self.rows if row not in exchanged), self.control])

    @property
    def formula_totals(self) -> Totals:
        """`totals` by the formula."""
        return Totals.of_entries([row.formula for row in self.exchanged])

    @property
    def handed_over_bytes_per_image(self) -> float:
        return self.totals.handed_over_bytes / self.images

    @property
    def equal(self) -> bool:
        """Whether the ledger is what the formula says, to the byte."""
        return all(row.equal for row in self.rows)

    def refuse_difference(self) -> None:
        """Raises LoftError where the ledger is not what the formula says."""
        wrong = [(row, name) for row in self.rows for name in row.different]
        if wrong:
            (row, name), more = wrong[0], len(wrong) - 1
            raise LoftError(
                f"the ledger of {self.path} does not equal the closed formula: {row.operation} {row.purpose} has "
                f"{getattr(row.ledger, name):,} {name}, by the formula {getattr(row.formula, name):,}"
                f"{f' ({more} more differ)' if more else ''}. Restore its run.json and ledger.json; where nobody changed "
                "them, quote none of its bytes (--verify shows every row)"
            )


def run_cost(path: Path) -> RunCost:
    """Ledger and formula of a finished pretraining or retraining run. Raises LoftError for anything else."""
    run = Run.open(path)
    if run.description.get("kind") not in ("pretrain", "retrain"):
        raise LoftError(f"{path} is neither a pretraining nor a retraining run: give a folder that loft pretrain or loft retrain printed")
    settings = settings_of(run) if run.description["kind"] == "pretrain" else None
    total = Ledger()
    ledgers = run.read_ledgers()
    for ledger in ledgers:
        total.add(ledger)
    planned, per_epoch, workers = (run.required(name, int) for name in ("total_steps", "steps_per_epoch", "world_size"))
    steps = (run.description.get("results") or {}).get("steps", planned)  # fewer, where it was stopped early
    if type(steps) is not int or not 1 <= steps <= planned:
        raise LoftError(f"{path / 'run.json'} does not say how many steps were made: restore it")
    if len(ledgers) != workers:
        raise LoftError(f"{path / 'ledger.json'} holds {len(ledgers)} ledgers for {workers} ranks: restore it")
    if run.other_sizes:
        raise LoftError(f"{path} was resumed with another number of ranks: no formula covers that; its bytes are in ledger.json")
    strategy = settings.strategy if settings else "retrain"
    points = steps // settings.loft.local_iterations if strategy == "loft" else steps
    if strategy in ("loft", "gpipe") and workers > 1 and points > MOST_POINTS:
        raise LoftError(f"{path} made more than {MOST_POINTS:,} rounds or steps: too many to go through")
    seen, network = seen_by(run), run.architecture
    if seen.image_size not in IMAGE_SIZES:
        raise LoftError(f"{path / 'run.json'} says no sensible image_size: restore it")
    parameters = network_size(network, run.hidden_widths, seen.image_size).parameters
    expected = as_ledger(list(_run_flows(run, settings, parameters, seen.image_size, workers, steps, per_epoch)))
    rows = [
        LedgerRow(operation, purpose, expected.entry(operation, purpose), total.entry(operation, purpose))
        for operation, purpose in sorted({(o, p) for side in (expected, total) for o, entries in side.entries.items() for p in entries})
        if purpose in TRAINING
    ]
    control = Entry()
    for operation in total.entries:
        control.add(total.entry(operation, "control"))
    rounds = math.ceil(steps / settings.loft.local_iterations) if strategy == "loft" else None
    data = str(run.required("data", dict).get("name"))
    passes = workers if strategy == "loft" and not settings.loft.shard_data else 1
    return RunCost(path, strategy, workers, steps, rounds, seen.images, passes, network, parameters, data, seen.image_size, rows, control)


def _run_flows(
    run: Run, settings: PretrainSettings | None, parameters: int, image_size: int, workers: int, steps: int, per_epoch: int
) -> Iterator[Flow]:
    """Everything that the run must have sent, but for `control`. `settings`: None for a retraining."""
    if workers == 1:
        return
    network = run.architecture
    if settings is None or settings.strategy == "data-parallel":
        yield broadcast(parameters, FLOAT32_BYTES, workers, "shared")
        yield from (flow.times(steps) for flow in data_parallel_step(parameters, workers))
    elif settings.strategy == "gpipe":
        crossing = crossing_elements(network, image_size, cuts(network, settings.pipeline.split, workers, image_size))
        yield from (flow.times(steps) for flow in pipeline_step(crossing, settings.batch_size, settings.pipeline.micro_batches))
        # at the start, wherever the full network is looked at, and its momentum in every checkpoint
        looks, checkpoints = _looks(run, settings, range(steps + 1), repeat(True), per_epoch)
        yield all_gather(parameters, FLOAT32_BYTES, workers, "merge").times(1 + looks + checkpoints)
    else:
        yield from _loft_run_flows(run, settings, network, workers, steps, per_epoch)


def _loft_run_flows(
    run: Run, settings: PretrainSettings, network: Architecture, workers: int, steps: int, per_epoch: int
) -> Iterator[Flow]:
    loft = settings.loft
    divided = division_of(network, loft.partition, loft.partition_unit)
    check_workers(partitioned_groups(filter_groups(network), loft.partition, loft.partition_unit), workers)
    yield broadcast(divided.partitioned, FLOAT32_BYTES, workers, "partitioned")
    yield broadcast(divided.shared, FLOAT32_BYTES, workers, "shared")
    # a finished run that was extended ended its rounds where it ended first
    totals = [*(epochs * per_epoch for epochs in settings.optimisation.restarts if epochs * per_epoch < steps), steps]
    averaging = list(averaging_rounds(loft, totals, (per_epoch, settings.snapshots.every.steps(per_epoch))))
    rounds = len(averaging)
    # an all-gather carries everything, whatever the deals
    moves = moved_parameters(settings, network, divided, workers, rounds) if loft.exchange == "alltoall" else repeat(None)
    for moved, average in zip(moves, averaging, strict=False):
        yield from exchange_flows(settings, divided, workers, moved, average)
    if loft.exchange == "alltoall" or loft.transport_dtype != "float32":
        looks, checkpoints = _looks(run, settings, round_ends(loft, totals), averaging, per_epoch)
        times = looks + (checkpoints if loft.momentum_across_rounds == "carry" else 0)
        yield all_gather(divided.partitioned, FLOAT32_BYTES, workers, "merge").times(times)


def _looks(run: Run, settings: PretrainSettings, points: Sequence[int], settled: Iterable[bool], per_epoch: int) -> tuple[int, int]:
    """After how many of the `points` (steps at which a full network may be had) it is put together, and how many checkpoints are written.

    `settled` says of every stretch between two points whether one can be had at its end, which a checkpoint waits for.
    """
    attempts = _attempts(run, settings, points[-1], per_epoch)
    asked_for, totals = run.interrupted_at_steps, {calendar.total_steps for _, calendar in attempts}
    looks, checkpoints, wanted = 0, 0, False
    for (begin, end), possible in zip(pairwise(points), settled, strict=False):
        due = next(calendar for first, calendar in reversed(attempts) if first <= begin).due(begin, end)
        wanted = wanted or due.checkpoint
        checkpoint = possible and (wanted or end in asked_for)
        looks += checkpoint or due.evaluation or (due.snapshot and (settings.snapshots.snapshot_tensors or end in totals))
        checkpoints += checkpoint
        wanted = wanted and not checkpoint
    return looks, checkpoints


def _attempts(run: Run, settings: PretrainSettings, steps: int, per_epoch: int) -> list[tuple[int, Calendar]]:
    """The first step of every attempt and when things fell due in it, from what each attempt says to have changed. The last ended at `steps`."""
    checkpointing, total = settings.checkpoints, steps
    attempts: list[tuple[int, Calendar]] = []

    def calendar() -> Calendar:
        return Calendar.of(total, per_epoch, settings.evaluation, settings.snapshots, checkpointing)

    for first, changed in reversed(run.attempts):
        attempts.append((first, calendar()))
        before = {name: change.get("before") for name, change in changed.items() if isinstance(change, dict)}
        if isinstance(before.get("checkpoint_every"), str):
            checkpointing = replace(checkpointing, checkpoint_every=before["checkpoint_every"])
        if type(before.get("epochs")) is int:
            total = min(steps, before["epochs"] * per_epoch)
    return [(0, calendar()), *reversed(attempts)]


def moved_parameters(settings: PretrainSettings, network: Architecture, divided: Division, workers: int, rounds: int) -> Iterator[int]:
    """D of every round, from the deals that the run's seed decides."""
    groups = partitioned_groups(filter_groups(network), settings.loft.partition, settings.loft.partition_unit)
    old = deal(groups, workers, settings.seed, 0)
    for number in range(1, rounds + 1):
        new = deal(groups, workers, settings.seed, number)
        stays = dict.fromkeys((group.name for group in groups), 0)
        for rank in range(workers):
            for name, filters in leaving(old, new, rank, groups)[rank].items():
                stays[name] += len(filters)
        yield divided.moved({group.name: group.width - stays[group.name] for group in groups})
        old = new
