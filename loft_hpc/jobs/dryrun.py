"""Dry runs: what a training would do, send and hold, without ranks, and of the data no more than its index."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from loft_hpc.analysis.timing import Cluster, Seconds
from loft_hpc.analysis.traffic import Division
from loft_hpc.data.catalogue import IMAGE_FOLDERS
from loft_hpc.data.dataset import DataMissing
from loft_hpc.data.registry import DataSettings, DataShape, folder_shape, known_shape
from loft_hpc.errors import LoftError
from loft_hpc.jobs.memory import RankMemory, rank_memories
from loft_hpc.jobs.prediction import Case, Course, Outlook, course, division_of, epoch_seconds, outlook
from loft_hpc.jobs.retrain import RetrainSettings, starting_weights
from loft_hpc.jobs.settings import flatten
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import GPU_PRECISIONS, Computation

LITTLE_LONGER = 1.25
"""Fewer workers that take at most so many times as long would do."""


@dataclass(frozen=True)
class Choice:
    """A training as it was asked for, and what else there is to choose."""

    case: Case
    asked: Outlook
    beside: list[Outlook]
    """Other ways to train on as many workers."""
    fewer: Outlook | None
    """The same on the fewest workers that take little longer, where half of them or fewer do."""

    @property
    def better(self) -> Outlook | None:
        """The shortest of `beside` that is shorter than what was asked for, where fewer workers would do."""
        shorter = [one for one in self.beside if one.seconds is not None and one.seconds < self.asked.seconds]
        return min(shorter, key=lambda one: one.seconds, default=None) if self.fewer else None

    @property
    def sees_all(self) -> bool:
        """Whether each of several workers sees all images in an epoch."""
        settings = self.case.settings
        return settings.strategy == "loft" and not settings.loft.shard_data and self.asked.workers > 1


@dataclass(frozen=True)
class Plan:
    """A training that has not been started."""

    workers: int
    choice: Choice
    divided: Division
    """Partitioned and shared parameters; all are shared where nothing is dealt."""
    course: Course
    memories: list[RankMemory]
    on_gpu: bool
    """Whether memory was counted for ranks that compute on GPUs."""
    epoch: Seconds | None
    """Predicted for an epoch, where a cluster was named."""

    @property
    def case(self) -> Case:
        return self.choice.case

    @property
    def rounds(self) -> int | None:
        return sum(kind.count for kind in self.course.exchanges) if self.case.settings.strategy == "loft" else None


def choose(case: Case, workers: int, cluster: Cluster | None) -> Choice:
    """Raises LoftError where the training would be refused: too many workers, or batches that are too small."""
    way = course(case, workers)
    Schedule(case.settings.optimisation, way.steps, way.steps_per_epoch)  # refuses a warm-up that is too long
    asked = outlook(case, workers, cluster)
    return Choice(case, asked, beside(case, workers, cluster), fewer_workers(case, asked, cluster))


def plan(case: Case, workers: int, cluster: Cluster | None) -> Plan:
    """Raises LoftError as `choose` does."""
    settings, on_gpu, choice = (
        case.settings,
        runs_on_gpu(case.settings.computation, cluster),
        choose(case, workers, cluster),
    )
    loft, way = settings.strategy == "loft", course(case, workers)
    return Plan(
        workers=workers,
        choice=choice,
        divided=division_of(case.network, settings.loft.partition, settings.loft.partition_unit)
        if loft
        else Division(0, case.size.parameters),
        course=way,
        memories=rank_memories(case, workers, on_gpu),
        on_gpu=on_gpu,
        epoch=epoch_seconds(case, workers, way, cluster) if cluster else None,
    )


def beside(case: Case, workers: int, cluster: Cluster | None) -> list[Outlook]:
    """The same recipe with sharded data (for LoFT with replicated data), data-parallel, and as a pipeline (for LoFT), on as many workers.

    None for a single worker, for which they are all the same, and for a training that is planned in rounds, not epochs.
    """
    settings = case.settings
    others = []
    if workers > 1 and settings.strategy != "data-parallel" and settings.rounds is None:
        if settings.strategy == "loft" and not settings.loft.shard_data:
            others.append(("--shard-data", replace(settings, loft=replace(settings.loft, shard_data=True))))
        others.append(("--strategy data-parallel", replace(settings, strategy="data-parallel")))
        if settings.strategy == "loft" and settings.batch_size >= settings.pipeline.micro_batches and not settings.computation.compile:
            others.append(("--strategy gpipe", replace(settings, strategy="gpipe")))
    return [outlook(replace(case, settings=other), workers, cluster, options) for options, other in others]


def fewer_workers(case: Case, asked: Outlook, cluster: Cluster | None) -> Outlook | None:
    """The training on a half, a quarter and so on of the workers, if that takes little longer: the fewest of them.

    LoFT on one worker is ordinary training, and so no choice.
    """
    found, workers = None, asked.workers // 2
    least = 2 if case.settings.strategy == "loft" else 1
    while cluster and workers >= least:
        other = outlook(case, workers, cluster, f"{workers} workers")
        if other.seconds is not None and other.seconds <= LITTLE_LONGER * asked.seconds:
            found = other
        workers //= 2
    return found


def data_shape(data: DataSettings, classes: int | None, images: int | None) -> tuple[DataShape, str]:
    """The shape of a data set, and where it is known from: of images on disk their index, unless they are described.

    Raises LoftError where nothing says it.
    """
    if classes is not None or images is not None:
        if data.dataset not in IMAGE_FOLDERS:
            raise LoftError(
                f"--classes and --images describe {' or '.join(IMAGE_FOLDERS)}: omit them for {data.dataset}",
                usage=True,
            )
        if classes is None or images is None:
            raise LoftError("--classes and --images describe images on disk together: give both", usage=True)
        return folder_shape(classes, images, 0, data.image_size), "as --classes and --images say"
    if data.dataset in IMAGE_FOLDERS:
        from loft_hpc.data.folders import shape_on_disk

        try:
            return shape_on_disk(data), f"by the index of {data.data_dir}"
        except DataMissing as problem:
            if data.dataset == "imagefolder":
                described = "or describe the images: --classes N --images N (training images)"
                raise LoftError(f"{problem}, {described}", usage=True) from None
    return known_shape(data.dataset, data.image_size), "not read"


def retraining(ticket: Ticket, settings: RetrainSettings, shape: DataShape) -> Case:
    """A ticket's retraining.

    Raises LoftError where it would be refused: other channels, other classes, no snapshot to rewind to.
    """
    network = ticket.architecture
    if shape.channels != network.in_channels:
        raise LoftError(
            f"{settings.data.dataset} has images of {shape.channels} channels, and {ticket.path} takes "
            f"{network.in_channels}: choose a data set of as many"
        )
    if shape.num_classes != network.num_classes:
        if not (settings.transfer or settings.new_classifier):
            raise LoftError(
                f"{ticket.path} was found on {network.num_classes} classes, and these are {shape.num_classes}: "
                "give the --data-dir that it was trained on, or --dataset for a new classifier"
            )
        network = replace(network, num_classes=shape.num_classes)
    starting_weights(ticket, settings.rewind)
    return Case(settings, shape, network, ticket.hidden_widths, ticket.mask.weights is not None)


def recipe(made: Plan) -> dict[str, Any]:
    """The settings that decide this training, with what they stand for where they are left to model and data set."""
    settings = made.case.settings
    values = flatten(settings) | {"image_size": made.case.shape.image_size}
    if isinstance(settings, RetrainSettings):
        return values
    tolerance, patience = settings.stopping.limits
    values |= {"widen": made.case.network.widen, "tolerance": tolerance, "patience": patience}
    idle = {"epochs"} if settings.rounds else {"rounds"}
    for owner, own in (("loft", settings.loft), ("gpipe", settings.pipeline)):
        idle |= set(flatten(own)) if settings.strategy != owner else set()
    if not settings.stopping.stop_when_stable:
        idle |= {"stability", "tolerance", "patience"}
    return {name: value for name, value in values.items() if name not in idle}


def runs_on_gpu(computation: Computation, cluster: Cluster | None) -> bool:
    """Whether ranks compute on GPUs: as --device and --precision say, else the cluster's file, else what is here.

    Raises LoftError as a training would.
    """
    if computation.device == "cpu" and computation.precision in GPU_PRECISIONS:
        raise LoftError(f"--precision {computation.precision} is for GPUs: omit it on a CPU")
    if computation.device == "auto" and computation.precision not in GPU_PRECISIONS:
        return cluster.device == "cuda" if cluster and cluster.device else torch.cuda.is_available()
    return computation.device != "cpu"
