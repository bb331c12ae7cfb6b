"""`loft commcost`: what a case would send and how long it would take, and the ledgers of real runs beside the formulas."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, repeat
from pathlib import Path

from loft_hpc.analysis import timing
from loft_hpc.analysis.size import network_size, section_flops
from loft_hpc.analysis.timing import Cluster, Seconds
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
    division,
    handed_over,
    loft_round,
    pipeline_step,
)
from loft_hpc.comm.ledger import Entry, Ledger
from loft_hpc.data.registry import DataShape, known_shape
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES
from loft_hpc.filterwise.loft import LoftSettings, averages
from loft_hpc.filterwise.partition import check_workers, deal, leaving, shares
from loft_hpc.jobs.pretrain import PretrainSettings, settings_of
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.pipeline.stages import cuts, parts
from loft_hpc.runs.run import Run

TRAINING = ("partitioned", "shared", "activation", "gradient", "merge")
"""Purposes that the formulas speak of; `control` holds what their sizes do not decide (objects, statistics of evaluations)."""


# -- any case ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """One strategy on so many workers, for the epochs of its settings."""

    strategy: str
    workers: int
    delivered_bytes: int
    """Payload that reaches workers."""
    handed_over_bytes: int
    wire_bytes: int
    seconds_per_epoch: Seconds | None
    impossible: str = ""
    """Why the strategy cannot run on so many workers."""


def predict(settings: PretrainSettings, workers: int, cluster: Cluster | None) -> Prediction:
    """The bytes of a whole training without evaluations, and the seconds of one of its epochs."""
    try:
        return _predict(settings, workers, cluster)
    except LoftError as problem:
        return Prediction(settings.strategy, workers, 0, 0, 0, None, str(problem))


def _predict(settings: PretrainSettings, workers: int, cluster: Cluster | None) -> Prediction:
    shape = known_shape(settings.data.dataset, settings.data.image_size)
    network = architecture(settings.model, shape.num_classes, shape.channels, shape.stem, settings.widen)
    of = {"loft": _loft_case, "data-parallel": _data_parallel_case, "gpipe": _pipeline_case}[settings.strategy]
    flows, seconds = of(settings, shape, network, workers, cluster)
    return Prediction(settings.strategy, workers, delivered(flows), handed_over(flows), sum(flow.wire_bytes for flow in flows), seconds)


Case = tuple[list[Flow], Seconds | None]


def _loft_case(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, cluster: Cluster | None) -> Case:
    groups = partitioned_groups(filter_groups(network), settings.loft.partition)
    check_workers(groups, workers)
    images = shape.train_images // workers if settings.loft.shard_data else shape.train_images
    steps = images // settings.batch_size
    if not steps:
        raise LoftError(f"a worker's {images} images make no batch of {settings.batch_size}")
    total = settings.rounds * settings.loft.local_iterations if settings.rounds else settings.epochs * steps
    divided = division_of(network, settings.loft.partition)
    both, partitioned = (_exchange(settings, divided, workers, average=average) for average in (True, False))
    averaging = list(averaging_rounds(settings.loft, total, steps))
    rounds, averaged = len(averaging), sum(averaging)
    flows = [flow.times(averaged) for flow in both] + [flow.times(rounds - averaged) for flow in partitioned]
    seconds = None
    if cluster:
        widest = {group.name: shares(group.width, workers)[0] for group in groups}
        flops = network_size(network, widest, shape.image_size).flops
        seconds = timing.loft_epoch(cluster, steps * settings.batch_size, steps / total, flops, flows, workers)
    return flows, seconds


def _data_parallel_case(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, cluster: Cluster | None) -> Case:
    if settings.batch_size < 2 * workers:
        raise LoftError(
            f"--batch-size {settings.batch_size} over {workers} workers leaves one with fewer than the 2 images of normalisation"
        )
    steps = shape.train_images // settings.batch_size
    step = data_parallel_step(division_of(network, "all-blocks").total, workers)
    seconds = None
    if cluster:
        flops = network_size(network, None, shape.image_size).flops
        seconds = timing.data_parallel_epoch(cluster, steps * settings.batch_size, steps, flops, step, workers)
    return [flow.times(steps * settings.epochs) for flow in step], seconds


def _pipeline_case(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, cluster: Cluster | None) -> Case:
    settings.pipeline.check_batch(settings.batch_size)
    chosen = cuts(network, settings.pipeline.split, workers, shape.image_size)
    steps = shape.train_images // settings.batch_size
    crossing = crossing_elements(network, shape.image_size, chosen)
    step = pipeline_step(crossing, settings.batch_size, settings.pipeline.micro_batches)
    seconds = None
    if cluster:
        images = settings.batch_size // settings.pipeline.micro_batches
        flops = section_flops_of(network, shape.image_size)
        of_stages = []
        for part in parts(network, chosen):
            blocks = flops[part.first : part.last + 1]
            of_stages.append(images * (sum(blocks) + (flops[0] if part.begins else 0) + (flops[-1] if part.ends else 0)))
        crossing_bytes = [FLOAT32_BYTES * images * elements for elements in crossing]
        one = timing.pipeline_step(cluster, of_stages, crossing_bytes, settings.pipeline.micro_batches, settings.pipeline.recompute)
        seconds = Seconds(steps * one.compute, steps * one.communicate)
    return [flow.times(steps * settings.epochs) for flow in step], seconds


def _exchange(settings: PretrainSettings, divided: Division, workers: int, moved: int | None = None, average: bool = True) -> list[Flow]:
    loft = settings.loft
    element_bytes = TRANSPORT_DTYPES[loft.transport_dtype].itemsize
    return loft_round(divided, workers, loft.exchange, element_bytes, 2 if loft.momentum_across_rounds == "carry" else 1, moved, average)


def averaging_rounds(settings: LoftSettings, total_steps: int, per_epoch: int) -> Iterator[bool]:
    """Of every round of a training, whether it averages the shared parameters."""
    ends = [*range(0, total_steps, settings.local_iterations), total_steps]
    for number, (begin, end) in enumerate(pairwise(ends), start=1):
        yield averages(settings, number, begin, end, per_epoch, total_steps)


division_of = cache(division)
section_flops_of = cache(section_flops)


# -- runs on disk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LedgerRow:
    """One operation and purpose of a run, all ranks together: what the formula says and what the ledger says."""

    operation: str
    purpose: str
    formula: Entry
    ledger: Entry

    @property
    def equal(self) -> bool:
        return all(
            getattr(self.formula, name) == getattr(self.ledger, name)
            for name in ("payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes", "wire_received_bytes")
        )


@dataclass(frozen=True)
class RunCost:
    """A pretraining run's ledger beside the closed formula."""

    path: Path
    strategy: str
    workers: int
    steps: int
    rounds: int | None
    rows: list[LedgerRow]
    control_bytes: int
    """Payload sent that the formulas do not speak of."""

    @property
    def exchanged(self) -> list[LedgerRow]:
        """What the steps and rounds exchange: without the start's broadcasts and without merges."""
        return [row for row in self.rows if row.operation != "broadcast" and row.purpose != "merge"]

    @property
    def formula_bytes(self) -> int:
        """What the workers hand over in their exchanges, the poster's accounting, by the formula."""
        return sum(row.formula.payload_sent_bytes for row in self.exchanged)

    @property
    def ledger_bytes(self) -> int:
        """The same by the ledger."""
        return sum(row.ledger.payload_sent_bytes for row in self.exchanged)


def run_cost(path: Path) -> RunCost:
    """Formula and ledger of a finished pretraining run. Raises LoftError for anything else."""
    run = Run.open(path)
    settings = settings_of(run)
    total = Ledger()
    ledgers = run.read_ledgers()
    for ledger in ledgers:
        total.add(ledger)
    steps, per_epoch = (run.description.get(name) for name in ("total_steps", "steps_per_epoch"))
    if not isinstance(steps, int) or not isinstance(per_epoch, int):
        raise LoftError(f"{path / 'run.json'} does not say how many steps were made: restore it")
    workers = len(ledgers)
    expected = as_ledger(list(_run_flows(run, settings, workers, steps, per_epoch)))
    rows = [
        LedgerRow(operation, purpose, expected.entry(operation, purpose), total.entry(operation, purpose))
        for operation, purpose in sorted({(o, p) for side in (expected, total) for o, entries in side.entries.items() for p in entries})
        if purpose in TRAINING
    ]
    control = sum(entries["control"].payload_sent_bytes for entries in total.entries.values() if "control" in entries)
    rounds = math.ceil(steps / settings.loft.local_iterations) if settings.strategy == "loft" else None
    return RunCost(path, settings.strategy, workers, steps, rounds, rows, control)


def _run_flows(run: Run, settings: PretrainSettings, workers: int, steps: int, per_epoch: int) -> Iterator[Flow]:
    """Everything that the run must have sent, but for `control`."""
    if workers == 1:
        return
    network = run.architecture
    parameters = division_of(network, "all-blocks").total
    if settings.strategy == "data-parallel":
        yield broadcast(parameters, FLOAT32_BYTES, workers, "shared")
        yield from (flow.times(steps) for flow in data_parallel_step(parameters, workers))
    elif settings.strategy == "gpipe":
        size = run.description["data"]["image_size"]
        crossing = crossing_elements(network, size, cuts(network, settings.pipeline.split, workers, size))
        yield from (flow.times(steps) for flow in pipeline_step(crossing, settings.batch_size, settings.pipeline.micro_batches))
        # at the start, and at the end of every epoch parameters and momentum
        yield all_gather(parameters, FLOAT32_BYTES, workers, "merge").times(1 + 2 * math.ceil(steps / per_epoch))
    else:
        yield from _loft_run_flows(settings, network, workers, steps, per_epoch)


def _loft_run_flows(settings: PretrainSettings, network: Architecture, workers: int, steps: int, per_epoch: int) -> Iterator[Flow]:
    loft = settings.loft
    divided = division_of(network, loft.partition)
    yield broadcast(divided.partitioned, FLOAT32_BYTES, workers, "partitioned")
    yield broadcast(divided.shared, FLOAT32_BYTES, workers, "shared")
    averaging = list(averaging_rounds(loft, steps, per_epoch))
    rounds = len(averaging)
    # an all-gather carries everything, whatever the deals
    moves = moved_parameters(settings, network, divided, workers, rounds) if loft.exchange == "alltoall" else repeat(None)
    for moved, average in zip(moves, averaging, strict=False):
        yield from _exchange(settings, divided, workers, moved, average)
    if loft.exchange == "alltoall" or loft.transport_dtype != "float32":
        copies = 2 if loft.momentum_across_rounds == "carry" else 1
        ends = [min(number * loft.local_iterations, steps) for number in range(rounds + 1)]
        # epochs end with the round in which they do, and the last one with the training
        times = sum(later // per_epoch > earlier // per_epoch or later == steps for earlier, later in pairwise(ends))
        yield all_gather(divided.partitioned, FLOAT32_BYTES, workers, "merge").times(times * copies)


def moved_parameters(settings: PretrainSettings, network: Architecture, divided: Division, workers: int, rounds: int) -> Iterator[int]:
    """D of every round, from the deals that the run's seed decides."""
    groups = partitioned_groups(filter_groups(network), settings.loft.partition)
    old = deal(groups, workers, settings.seed, 0)
    for number in range(1, rounds + 1):
        new = deal(groups, workers, settings.seed, number)
        stays = dict.fromkeys((group.name for group in groups), 0)
        for rank in range(workers):
            for name, filters in leaving(old, new, rank, groups)[rank].items():
                stays[name] += len(filters)
        yield divided.moved({group.name: group.width - stays[group.name] for group in groups})
        old = new


def with_strategy(settings: PretrainSettings, strategy: str) -> PretrainSettings:
    """The same case, trained in another way."""
    return replace(settings, strategy=strategy)


def winners(predictions: Sequence[Prediction]) -> dict[int, str]:
    """For each number of workers, the strategy whose epoch is shortest."""
    best: dict[int, Prediction] = {}
    for prediction in predictions:
        if prediction.seconds_per_epoch is None:
            continue
        other = best.get(prediction.workers)
        if other is None or prediction.seconds_per_epoch.total < other.seconds_per_epoch.total:
            best[prediction.workers] = prediction
    return {workers: prediction.strategy for workers, prediction in best.items()}
