"""What a training would send and how long it would take: `loft commcost` without a run, dry runs, plans of jobs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from loft_hpc.analysis import timing
from loft_hpc.analysis.size import Size, network_size, section_flops
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
from loft_hpc.filterwise.partition import check_workers
from loft_hpc.jobs.pretrain import PretrainSettings, order_of, step_images
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.pipeline.stages import cuts, parts


@dataclass(frozen=True)
class Case:
    """A training that need not have been started."""

    settings: PretrainSettings | RetrainSettings
    shape: DataShape
    network: Architecture
    widths: Mapping[str, int] = field(default_factory=dict)
    """Hidden filters by block, where they are not the architecture's: of a ticket."""
    masked: bool = False
    """Whether a mask of weights is trained with."""

    @classmethod
    def of(cls, settings: PretrainSettings, shape: DataShape | None = None) -> "Case":
        """A pretraining. Without a shape, the data set's own; raises LoftError for data that have none."""
        shape = shape or known_shape(settings.data.dataset, settings.data.image_size)
        network = architecture(settings.model, shape.num_classes, shape.channels, shape.stem, settings.widen)
        return cls(settings, shape, network)

    @property
    def size(self) -> Size:
        """Of the whole network."""
        return network_size_of(self.network, tuple(self.widths.items()), self.shape.image_size)

    @property
    def batch_parts(self) -> int | None:
        return getattr(self.settings, "batch_parts", None)

    def largest_share(self, workers: int) -> list[int]:
        """Images of each part of a split batch that rank 0 computes; no rank has more."""
        batch, parts = self.settings.batch_size, self.batch_parts or workers
        return [len(range(part, batch, parts)) for part in range(0, parts, workers)]


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
    step_images: int
    """Images of a step of all workers together."""
    exchanges: list[Exchanges]

    @property
    def flows(self) -> list[Flow]:
        """Of the whole training, without evaluations."""
        return [flow.times(kind.count) for kind in self.exchanges for flow in kind.flows]

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def images(self) -> int:
        """Images that all workers together see in the whole training."""
        return self.steps * self.step_images


def course(case: Case, workers: int) -> Course:
    """Steps and exchanges of a training on so many workers. Raises LoftError where it is not possible."""
    return _WAYS[case.settings.strategy][0](case, workers)


def epoch_seconds(case: Case, workers: int, way: Course, cluster: Cluster) -> Seconds:
    """Of an epoch of that course."""
    return _WAYS[case.settings.strategy][1](case, workers, way, cluster)


def _loft_course(case: Case, workers: int) -> Course:
    settings = case.settings
    check_workers(partitioned_groups(filter_groups(case.network), settings.loft.partition, settings.loft.partition_unit), workers)
    steps = order_of(settings, case.shape.train_images, 0, workers).steps_per_epoch
    total = settings.rounds * settings.loft.local_iterations if settings.rounds else settings.epochs * steps
    divided = division_of(case.network, settings.loft.partition, settings.loft.partition_unit)
    averaging = list(averaging_rounds(settings.loft, (total,), (steps, settings.snapshots.every.steps(steps))))
    counts = {True: sum(averaging), False: len(averaging) - sum(averaging)}
    exchanges = [
        Exchanges("round", count, exchange_flows(settings, divided, workers, average=average)) for average, count in counts.items() if count
    ]
    return Course(steps, total, step_images(settings, workers), exchanges)


def _loft_seconds(case: Case, workers: int, way: Course, cluster: Cluster) -> Seconds:
    groups = partitioned_groups(filter_groups(case.network), case.settings.loft.partition, case.settings.loft.partition_unit)
    widths = {group.name: group.shares(workers)[0] for group in groups}
    flops = network_size_of(case.network, tuple(widths.items()), case.shape.image_size).flops
    images = way.steps_per_epoch * case.settings.batch_size
    return timing.loft_epoch(cluster, images, way.steps_per_epoch / way.steps, flops, way.flows, workers)


def _data_parallel_course(case: Case, workers: int) -> Course:
    return _of_steps(case, workers, data_parallel_step(case.size.parameters, workers))


def _data_parallel_seconds(case: Case, workers: int, way: Course, cluster: Cluster) -> Seconds:
    images = sum(case.largest_share(workers))
    step, flops = way.exchanges[0].flows, case.size.flops
    return timing.data_parallel_epoch(cluster, images, way.steps_per_epoch, flops, step, workers)


def _pipeline_course(case: Case, workers: int) -> Course:
    settings, size = case.settings, case.shape.image_size
    settings.pipeline.check_batch(settings.batch_size)
    crossing = crossing_elements(case.network, size, cuts(case.network, settings.pipeline.split, workers, size))
    return _of_steps(case, workers, pipeline_step(crossing, settings.batch_size, settings.pipeline.micro_batches))


def _of_steps(case: Case, workers: int, flows: list[Flow]) -> Course:
    """All ranks together are one worker, and every step exchanges."""
    order = order_of(case.settings, case.shape.train_images, 0, workers)
    order.in_parts(case.batch_parts)  # refuses fewer parts than ranks
    steps = order.steps_per_epoch * case.settings.epochs
    return Course(order.steps_per_epoch, steps, step_images(case.settings, workers), [Exchanges("step", steps, flows)])


def _pipeline_seconds(case: Case, workers: int, way: Course, cluster: Cluster) -> Seconds:
    pipeline, size = case.settings.pipeline, case.shape.image_size
    chosen = cuts(case.network, pipeline.split, workers, size)
    images = case.settings.batch_size // pipeline.micro_batches
    flops = section_flops_of(case.network, size)
    of_stages = []
    for part in parts(case.network, chosen):
        blocks = flops[part.first : part.last + 1]
        of_stages.append(images * (sum(blocks) + (flops[0] if part.begins else 0) + (flops[-1] if part.ends else 0)))
    crossing_bytes = [FLOAT32_BYTES * images * elements for elements in crossing_elements(case.network, size, chosen)]
    one = timing.pipeline_step(cluster, of_stages, crossing_bytes, pipeline.micro_batches, pipeline.recompute)
    return Seconds(way.steps_per_epoch * one.compute, way.steps_per_epoch * one.communicate)


_WAYS = {
    "loft": (_loft_course, _loft_seconds),
    "data-parallel": (_data_parallel_course, _data_parallel_seconds),
    "gpipe": (_pipeline_course, _pipeline_seconds),
}


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
        case = Case.of(settings)
        way = course(case, workers)
        seconds = epoch_seconds(case, workers, way, cluster) if cluster else None
    except LoftError as problem:
        return Prediction(settings.strategy, workers, 0, 0, 0, None, impossible=str(problem))
    wire = sum(flow.wire_bytes for flow in way.flows)
    return Prediction(settings.strategy, workers, delivered(way.flows), handed_over(way.flows), wire, seconds, way.images)


@dataclass(frozen=True)
class Outlook:
    """What a whole training would take on so many workers, without evaluations."""

    options: str
    """What makes it another one than the training that was asked for, as typed; empty for that one."""
    workers: int
    images: int = 0
    """Seen by all workers together."""
    seconds: float | None = None
    """Wall time, where a cluster was named."""
    handed_over_bytes: int = 0
    delivered_bytes: int = 0
    wire_bytes: int = 0
    impossible: str = ""
    """Why it cannot be."""

    @property
    def worker_seconds(self) -> float | None:
        return None if self.seconds is None else self.workers * self.seconds


def outlook(case: Case, workers: int, cluster: Cluster | None, options: str = "") -> Outlook:
    try:
        way = course(case, workers)
        seconds = epoch_seconds(case, workers, way, cluster).total * way.epochs if cluster else None
    except LoftError as problem:
        return Outlook(options, workers, impossible=str(problem))
    wire = sum(flow.wire_bytes for flow in way.flows)
    return Outlook(options, workers, way.images, seconds, handed_over(way.flows), delivered(way.flows), wire)


def exchange_flows(
    settings: PretrainSettings, divided: Division, workers: int, moved: int | None = None, average: bool = True
) -> list[Flow]:
    loft = settings.loft
    element_bytes = TRANSPORT_DTYPES[loft.transport_dtype].itemsize
    return loft_round(
        divided,
        workers,
        loft.exchange,
        element_bytes,
        2 if loft.momentum_across_rounds == "carry" else 1,
        moved,
        average,
    )


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


@cache
def network_size_of(network: Architecture, widths: tuple[tuple[str, int], ...], image_size: int) -> Size:
    return network_size(network, dict(widths), image_size)


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
