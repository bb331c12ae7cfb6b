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
from loft_hpc.jobs.pretrain import PretrainSettings, order_of
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
    images: int = 0
    """Training images of all workers together, those of every repetition counted."""
    impossible: str = ""
    """Why the strategy cannot run on so many workers."""


def predict(settings: PretrainSettings, workers: int, cluster: Cluster | None) -> Prediction:
    """The bytes of a whole training without evaluations, and the seconds of one of its epochs."""
    try:
        return _predict(settings, workers, cluster)
    except LoftError as problem:
        return Prediction(settings.strategy, workers, 0, 0, 0, None, impossible=str(problem))


@dataclass(frozen=True)
class Exchanges:
    """One kind of exchange of a training."""

    unit: str
    """`round` or `step`."""
    count: int
    """How many the training has."""
    flows: list[Flow]
    """What one of them carries."""


@dataclass(frozen=True)
class Course:
    """The way of a training: its steps, and what the ranks exchange in it."""

    steps_per_epoch: int
    steps: int
    """Of a worker, in the whole training."""
    exchanges: list[Exchanges]

    @property
    def flows(self) -> list[Flow]:
        """Of the whole training, without evaluations."""
        return [flow.times(kind.count) for kind in self.exchanges for flow in kind.flows]

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch


def _predict(settings: PretrainSettings, workers: int, cluster: Cluster | None) -> Prediction:
    shape, network = planned(settings)
    way = course(settings, shape, network, workers)
    seconds = epoch_seconds(settings, shape, network, workers, way, cluster) if cluster else None
    wire = sum(flow.wire_bytes for flow in way.flows)
    images = way.steps * order_of(settings, shape.train_images, 0, workers).images_per_step
    return Prediction(settings.strategy, workers, delivered(way.flows), handed_over(way.flows), wire, seconds, images)


def planned(settings: PretrainSettings) -> tuple[DataShape, Architecture]:
    """The data set's shape and the network that settings name. Raises LoftError for data that have no shape before they are read."""
    shape = known_shape(settings.data.dataset, settings.data.image_size)
    return shape, architecture(settings.model, shape.num_classes, shape.channels, shape.stem, settings.widen)


def course(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int) -> Course:
    """Steps and exchanges of a training on so many workers. Raises LoftError where it is not possible."""
    of = {"loft": _loft_course, "data-parallel": _data_parallel_course, "gpipe": _pipeline_course}[settings.strategy]
    return of(settings, shape, network, workers)


def epoch_seconds(
    settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, way: Course, cluster: Cluster
) -> Seconds:
    """Of an epoch of that course."""
    of = {"loft": _loft_seconds, "data-parallel": _data_parallel_seconds, "gpipe": _pipeline_seconds}[settings.strategy]
    return of(settings, shape, network, workers, way, cluster)


def _loft_course(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int) -> Course:
    groups = partitioned_groups(filter_groups(network), settings.loft.partition)
    check_workers(groups, workers)
    steps = order_of(settings, shape.train_images, 0, workers).steps_per_epoch
    total = settings.rounds * settings.loft.local_iterations if settings.rounds else settings.epochs * steps
    divided = division_of(network, settings.loft.partition)
    averaging = list(averaging_rounds(settings.loft, (total,), (steps, settings.snapshots.every.steps(steps))))
    counts = {True: sum(averaging), False: len(averaging) - sum(averaging)}
    exchanges = [
        Exchanges("round", count, exchange_flows(settings, divided, workers, average=average)) for average, count in counts.items() if count
    ]
    return Course(steps, total, exchanges)


def _loft_seconds(
    settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, way: Course, cluster: Cluster
) -> Seconds:
    groups = partitioned_groups(filter_groups(network), settings.loft.partition)
    flops = network_size(network, {group.name: shares(group.width, workers)[0] for group in groups}, shape.image_size).flops
    images = way.steps_per_epoch * settings.batch_size
    return timing.loft_epoch(cluster, images, way.steps_per_epoch / way.steps, flops, way.flows, workers)


def _data_parallel_course(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int) -> Course:
    return _of_steps(settings, shape, workers, data_parallel_step(division_of(network, "all-blocks").total, workers))


def _data_parallel_seconds(
    settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, way: Course, cluster: Cluster
) -> Seconds:
    steps, flops = way.steps_per_epoch, network_size(network, None, shape.image_size).flops
    return timing.data_parallel_epoch(cluster, steps * settings.batch_size, steps, flops, way.exchanges[0].flows, workers)


def _pipeline_course(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int) -> Course:
    settings.pipeline.check_batch(settings.batch_size)
    crossing = crossing_elements(network, shape.image_size, cuts(network, settings.pipeline.split, workers, shape.image_size))
    return _of_steps(settings, shape, workers, pipeline_step(crossing, settings.batch_size, settings.pipeline.micro_batches))


def _of_steps(settings: PretrainSettings, shape: DataShape, workers: int, flows: list[Flow]) -> Course:
    """All ranks together are one worker, and every step exchanges."""
    steps = order_of(settings, shape.train_images, 0, workers).steps_per_epoch
    return Course(steps, steps * settings.epochs, [Exchanges("step", steps * settings.epochs, flows)])


def _pipeline_seconds(
    settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, way: Course, cluster: Cluster
) -> Seconds:
    chosen = cuts(network, settings.pipeline.split, workers, shape.image_size)
    images = settings.batch_size // settings.pipeline.micro_batches
    flops = section_flops_of(network, shape.image_size)
    of_stages = []
    for part in parts(network, chosen):
        blocks = flops[part.first : part.last + 1]
        of_stages.append(images * (sum(blocks) + (flops[0] if part.begins else 0) + (flops[-1] if part.ends else 0)))
    crossing_bytes = [FLOAT32_BYTES * images * elements for elements in crossing_elements(network, shape.image_size, chosen)]
    one = timing.pipeline_step(cluster, of_stages, crossing_bytes, settings.pipeline.micro_batches, settings.pipeline.recompute)
    return Seconds(way.steps_per_epoch * one.compute, way.steps_per_epoch * one.communicate)


def exchange_flows(
    settings: PretrainSettings, divided: Division, workers: int, moved: int | None = None, average: bool = True
) -> list[Flow]:
    loft = settings.loft
    element_bytes = TRANSPORT_DTYPES[loft.transport_dtype].itemsize
    return loft_round(divided, workers, loft.exchange, element_bytes, 2 if loft.momentum_across_rounds == "carry" else 1, moved, average)


def round_ends(settings: LoftSettings, ends: Sequence[int]) -> list[int]:
    """The steps at which rounds begin and end. `ends`: where the training ended, several times if it was extended."""
    points = [0]
    for end in ends:
        points += [*range(points[-1] + settings.local_iterations, end, settings.local_iterations), end]
    return points


def averaging_rounds(settings: LoftSettings, ends: Sequence[int], looks: Sequence[int]) -> Iterator[bool]:
    """Of every round of a training, whether it averages the shared parameters; `ends` as for `round_ends`, `looks` as for `averages`."""
    for number, (begin, end) in enumerate(pairwise(round_ends(settings, ends)), start=1):
        yield averages(settings, number, begin, end, looks, next(total for total in ends if total >= end))


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
