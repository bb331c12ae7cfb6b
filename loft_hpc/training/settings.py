"""How a network is trained: frozen, validated where they are made, printed resolved into run.json."""

import math
from dataclasses import dataclass
from typing import Any

from loft_hpc.errors import LoftError
from loft_hpc.training.interval import Interval

SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16")
GPU_PRECISIONS = ("tf32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
MAX_EPOCHS = 1_000_000
MAX_IMAGES_AT_ONCE = 10_000
MAX_BATCH = 1_000_000_000
"""Images of a step, of all ranks: more than any data set has."""
MAX_STATISTICS_BATCHES = 100_000
MAX_STALL_SECONDS = 1e7
"""A thread waits no longer than 292 years, and no job runs for a third of one."""


MAX_STEPS = 1_000_000_000
"""Of one training, of a worker: what run.json and its logs count up to."""
MAX_FLOAT32 = 3e38
"""torch takes no learning rate that its float32 cannot hold."""
MAX_ROUNDS = 10_000_000
MAX_SEED = 2**63 - 1
"""What a file may say, and so the largest that a run can be gone on with."""


def refuse_outside(settings: Any, **bounds: tuple[float, float]) -> None:
    """For a `__post_init__`. Raises LoftError, naming the option, unless each of these fields is None or a number between its two bounds."""
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:  # NaN is not
            raise LoftError(f"--{name.replace('_', '-')} {value} must lie between {least:,} and {most:,}", usage=True)


@dataclass(frozen=True)
class Optimisation:
    """SGD with momentum and a learning rate that is a function of the step."""

    lr: float = 0.05
    """Learning rate at the start."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    """`cosine` to zero over the whole training, `step` (times `decay` at each milestone), or `constant`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the training at which `step` lowers the learning rate."""
    decay: float = 0.1
    warmup: str = "0"
    """How long the learning rate rises linearly at the start, as in `5ep` or `500it` (Goyal et al. 2017, arXiv 1706.02677)."""
    restarts: tuple[int, ...] = ()
    """Epochs after which the schedule began anew, because a finished training was extended there."""

    def __post_init__(self):
        refuse_outside(self, lr=(0, MAX_FLOAT32), momentum=(0, 1), weight_decay=(0, MAX_FLOAT32), decay=(0, MAX_FLOAT32))
        if self.momentum >= 1:
            raise LoftError(f"--momentum {self.momentum} must lie below 1", usage=True)
        if self.schedule not in SCHEDULES:
            raise LoftError(f"unknown schedule '{self.schedule}': choose one of {', '.join(SCHEDULES)}", usage=True)
        if any(not 0 < fraction < 1 for fraction in self.milestones):
            raise LoftError("milestones are fractions of the training, between 0 and 1", usage=True)
        if math.log10(max(self.lr, 1)) + len(self.milestones) * math.log10(max(self.decay, 1)) > math.log10(MAX_FLOAT32):
            raise LoftError(f"--decay {self.decay:g} raises the learning rate beyond {MAX_FLOAT32:g}: give a smaller one", usage=True)
        Interval.parse(self.warmup, "--warmup")
        if any(not 0 < epoch <= MAX_EPOCHS for epoch in self.restarts) or list(self.restarts) != sorted(set(self.restarts)):
            raise LoftError("the schedule of a training begins anew after ascending numbers of epochs", usage=True)


@dataclass(frozen=True)
class Computation:
    """Where and how the arithmetic is done."""

    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu` or `cuda`."""
    precision: str = "auto"
    """`float32` means float32, also on GPUs; `tf32` is float32 whose products are rounded to 10 bits, `bfloat16` runs convolutions under
    autocast, both on GPUs only; parameters stay float32. `auto` is tf32 on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the network with torch.compile, on a GPU with CUDA graphs, before its first step. Rounding differs from an uncompiled run's."""

    def __post_init__(self):
        if self.device not in DEVICES:
            raise LoftError(f"unknown device '{self.device}': choose one of {', '.join(DEVICES)}", usage=True)
        if self.precision not in PRECISIONS:
            raise LoftError(f"unknown precision '{self.precision}': choose one of {', '.join(PRECISIONS)}", usage=True)


@dataclass(frozen=True)
class Snapshots:
    """When the filters' rankings are recorded, and whether the whole network is."""

    snapshot_every: str = "1ep"
    """Between two snapshots, as in `1ep` or `200it`; `0` records the first and the last network alone."""
    snapshot_tensors: bool = True
    """Record the full network each time, to draw tickets from; otherwise norms and scales of its filters alone (kilobytes)."""

    def __post_init__(self):
        Interval.parse(self.snapshot_every, "--snapshot-every")

    @property
    def every(self) -> Interval:
        return Interval.parse(self.snapshot_every, "--snapshot-every")


@dataclass(frozen=True)
class Checkpointing:
    """When everything is written down that a run goes on from, besides the end and preemption. What is learnt does not depend on it."""

    checkpoint_every: str = "1ep"
    """Between two checkpoints, as in `1ep` or `200it`; `0` for none but at the end and when preempted. Where a worker's shared
    parameters are its own for some rounds, the next round that averages them."""
    keep_checkpoints: int = 2
    """How many are kept: the newest, and earlier ones to fall back on."""

    def __post_init__(self):
        Interval.parse(self.checkpoint_every, "--checkpoint-every")
        refuse_outside(self, keep_checkpoints=(1, MAX_STEPS))

    @property
    def every(self) -> Interval:
        return Interval.parse(self.checkpoint_every, "--checkpoint-every")


@dataclass(frozen=True)
class Supervision:
    """How a running job is looked after. Decides nothing of what is learnt, and may be another one when a run goes on."""

    stall_seconds: float = 300.0
    """Seconds without a sign of life from a rank, or without its getting on by a batch or a message, after which the job is ended; 0: never."""
    check_ranks: bool = False
    """After every round (or few steps), compare a hash of what all ranks should hold alike."""

    def __post_init__(self):
        refuse_outside(self, stall_seconds=(0, MAX_STALL_SECONDS))


@dataclass(frozen=True)
class Evaluation:
    """How a network is judged."""

    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    evaluation_batch: int = 250
    statistics_batches: int = 16
    """Training batches (not augmented, the same in every run) over which normalisation statistics are re-estimated first."""
    statistics_batch: int = 64

    def __post_init__(self):
        for name in ("evaluate_every", "evaluation_batch", "statistics_batches", "statistics_batch"):
            least = 2 if name == "statistics_batch" else 1  # one image has no variance
            if getattr(self, name) < least:
                raise LoftError(f"--{name.replace('_', '-')} must be at least {least}", usage=True)
        for name, most in (
            ("evaluation_batch", MAX_IMAGES_AT_ONCE),
            ("statistics_batch", MAX_IMAGES_AT_ONCE),
            ("statistics_batches", MAX_STATISTICS_BATCHES),
            ("evaluate_every", MAX_EPOCHS),
        ):
            if getattr(self, name) > most:
                raise LoftError(f"--{name.replace('_', '-')} must be at most {most:,}", usage=True)
