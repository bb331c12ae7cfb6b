"""What a case would send and how long it would take: `loft commcost` without a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from loft_hpc.analysis import timing
from loft_hpc.analysis.size import network_size, section_flops
from loft_hpc.analysis.timing import Cluster, Seconds
from loft_hpc.analysis.traffic import (
    FLOAT32_BYTES,
    Division,
    Flow,
    crossing_elements,
    data_parallel_step,
    delivered,
    division,
    handed_over,
    loft_round,
    pipeline_step,
)
from loft_hpc.data.registry import DataShape, known_shape
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES
from loft_hpc.filterwise.loft import LoftSettings, averages
from loft_hpc.filterwise.partition import check_workers, shares
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.pipeline.stages import cuts, parts


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
    both, partitioned = (exchange_flows(settings, divided, workers, average=average) for average in (True, False))
    averaging = list(averaging_rounds(settings.loft, total, (steps, settings.snapshots.every.steps(steps))))
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


def exchange_flows(
    settings: PretrainSettings, divided: Division, workers: int, moved: int | None = None, average: bool = True
) -> list[Flow]:
    loft = settings.loft
    element_bytes = TRANSPORT_DTYPES[loft.transport_dtype].itemsize
    return loft_round(divided, workers, loft.exchange, element_bytes, 2 if loft.momentum_across_rounds == "carry" else 1, moved, average)


def averaging_rounds(settings: LoftSettings, total_steps: int, looks: Sequence[int]) -> Iterator[bool]:
    """Of every round of a training, whether it averages the shared parameters; `looks` as for `averages`."""
    ends = [*range(0, total_steps, settings.local_iterations), total_steps]
    for number, (begin, end) in enumerate(pairwise(ends), start=1):
        yield averages(settings, number, begin, end, looks, total_steps)


division_of = cache(division)
section_flops_of = cache(section_flops)


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
