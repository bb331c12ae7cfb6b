"""`loft pretrain --dry-run`: what a pretraining would do, send and hold, without data and without ranks."""

from dataclasses import dataclass
from typing import Any

import torch

from loft_hpc.analysis.timing import Cluster, Seconds
from loft_hpc.analysis.traffic import Division
from loft_hpc.data.registry import DataShape
from loft_hpc.errors import LoftError
from loft_hpc.jobs.memory import RankMemory, rank_memories
from loft_hpc.jobs.prediction import Course, course, division_of, epoch_seconds, planned
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.settings import flatten
from loft_hpc.models.architecture import Architecture
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation


@dataclass(frozen=True)
class Plan:
    """A pretraining that has not been started."""

    settings: PretrainSettings
    workers: int
    shape: DataShape
    network: Architecture
    divided: Division
    """Partitioned and shared parameters; all are shared where nothing is dealt."""
    course: Course
    memories: list[RankMemory]
    on_gpu: bool
    """Whether memory was counted for ranks that compute on GPUs."""
    epoch: Seconds | None
    """Predicted for an epoch, where a cluster was named."""

    @property
    def training_seconds(self) -> float | None:
        """Of the whole training, without evaluations."""
        return self.epoch and self.epoch.total * self.course.epochs

    @property
    def rounds(self) -> int | None:
        return sum(kind.count for kind in self.course.exchanges) if self.settings.strategy == "loft" else None


def plan(settings: PretrainSettings, workers: int, cluster: Cluster | None) -> Plan:
    """Raises LoftError where the training would be refused: too many workers, batches too small, data whose shape is not known."""
    shape, network = planned(settings)
    on_gpu = _on_gpu(settings.computation)
    loft = settings.strategy == "loft"
    way = course(settings, shape, network, workers)
    Schedule(settings.optimisation, way.steps, way.steps_per_epoch)  # refuses a warm-up that is too long
    division = division_of(network, settings.loft.partition)
    return Plan(
        settings=settings,
        workers=workers,
        shape=shape,
        network=network,
        divided=division if loft else Division(0, division.total),
        course=way,
        memories=rank_memories(settings, shape, network, workers, on_gpu),
        on_gpu=on_gpu,
        epoch=epoch_seconds(settings, shape, network, workers, way, cluster) if cluster else None,
    )


def recipe(made: Plan) -> dict[str, Any]:
    """The options that decide this training, with what they stand for where they are left to model and data set."""
    settings = made.settings
    values = flatten(settings) | {"widen": made.network.widen, "image_size": made.shape.image_size}
    values |= dict(zip(("tolerance", "patience"), settings.stopping.limits, strict=True))
    idle = {"restarts"} | ({"epochs"} if settings.rounds else {"rounds"})
    for owner, own in (("loft", settings.loft), ("gpipe", settings.pipeline)):
        idle |= set(flatten(own)) if settings.strategy != owner else set()
    if not settings.stopping.stop_when_stable:
        idle |= {"stability", "tolerance", "patience"}
    return {name: value for name, value in values.items() if name not in idle}


def _on_gpu(computation: Computation) -> bool:
    """Raises LoftError as the training itself would."""
    if computation.device == "cpu" and computation.precision == "bfloat16":
        raise LoftError("--precision bfloat16 is for GPUs: leave it away on a CPU")
    asked = computation.device == "cuda" or computation.precision == "bfloat16"
    return asked or (computation.device == "auto" and torch.cuda.is_available())
