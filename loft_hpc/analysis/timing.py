"""Seconds per epoch from an alpha-beta model: what a cluster's latency, bandwidth and speed make of computation and bytes.

Legend: alpha latency of a message (s), B bandwidth of a link (bytes/s), F FLOP rate of a worker (FLOP/s), S workers, n bytes.

    ring all-reduce of n          2(S-1) (alpha + n / (S B))
    ring all-gather, n in all     (S-1) (alpha + n / (S B))
    all-to-all, n sent by a rank  (S-1) alpha + n / B
    message of n                  alpha + n / B

(Hockney's model; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".) A forward
pass costs the network's FLOPs, a backward pass twice as many. Computation and collectives take turns, as in our strategies; in a pipeline
they overlap, so its schedule is played through, message by message. Not in the model: congestion, memory passes, evaluations.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from loft_hpc.analysis.traffic import Flow
from loft_hpc.errors import LoftError
from loft_hpc.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BACKWARD_PER_FORWARD = 2
EXAMPLES = Path(__file__).parent / "clusters"
_FILE_BYTES = 1 << 16
_BOUNDS = {
    "latency_seconds": (0, 1e3),
    "bandwidth_bytes_per_second": (1, 1e18),
    "flops_per_second": (1, 1e24),
}
"""From the least to the most that any cluster has; in between, all that is computed from them is a finite number."""


@dataclass(frozen=True)
class Cluster:
    """A cluster, as a TOML file describes it."""

    name: str
    latency_seconds: float
    """Of one message between two ranks."""
    bandwidth_bytes_per_second: float
    """Of one rank's link, each way."""
    flops_per_second: float
    """What one worker sustains in training."""
    source: str = ""
    """Where the figures come from."""

    @classmethod
    def read(cls, name: str) -> "Cluster":
        """A TOML file, or one of the examples by name. Raises LoftError where it is missing or does not describe a cluster."""
        example = EXAMPLES / f"{name}.toml"
        path = example if example.exists() and not Path(name).exists() else Path(name)
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in EXAMPLES.glob("*.toml")))
            raise LoftError(f"no cluster file {name}: give a TOML file, or one of the examples {there}")
        try:
            values = tomllib.loads(read_text(path, _FILE_BYTES))
        except (ValueError, RecursionError) as problem:
            raise LoftError(f"{path} is no TOML file ({problem})") from None
        known = {field.name for field in fields(cls)}
        missing = sorted(known - {"source"} - values.keys())
        if missing:
            raise LoftError(f"{path} lacks {', '.join(missing)}: a cluster needs " + ", ".join(sorted(known - {"source"})))
        strange = sorted(values.keys() - known)
        if strange:
            raise LoftError(f"{path} has {strange[0]}, which no cluster has: its keys are {', '.join(sorted(known))}")
        for key, (least, most) in _BOUNDS.items():
            value = values[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise LoftError(f"{path}: {key} must be a number from {least} to {most:g}")
        for key in ("name", "source"):
            if not isinstance(values.get(key, ""), str):
                raise LoftError(f"{path}: {key} must be a text in quotation marks")
        return cls(**values)

    def message_seconds(self, size: float) -> float:
        return self.latency_seconds + size / self.bandwidth_bytes_per_second

    def collective_seconds(self, flows: Sequence[Flow], workers: int) -> float:
        """The collectives of `flows`, one after the other."""
        rounds = {"allreduce": 2 * (workers - 1), "allgather": workers - 1, "alltoall": workers - 1, "broadcast": workers - 1}
        return sum(
            flow.calls * rounds[flow.operation] * self.latency_seconds + flow.largest_rank_bytes / self.bandwidth_bytes_per_second
            for flow in flows
        )


@dataclass(frozen=True)
class Seconds:
    """Of an epoch on one worker."""

    compute: float
    communicate: float
    """Time that computation does not hide; for a pipeline its bubble too."""

    @property
    def total(self) -> float:
        return self.compute + self.communicate


def training_seconds(cluster: Cluster, forward_flops: float) -> float:
    return (1 + BACKWARD_PER_FORWARD) * forward_flops / cluster.flops_per_second


def loft_epoch(cluster: Cluster, images: int, share: float, sub_flops: float, flows: Sequence[Flow], workers: int) -> Seconds:
    """`images` that each worker walks, `sub_flops` of a sub-network per image, `flows` of a training of which an epoch is this share."""
    return Seconds(training_seconds(cluster, images * sub_flops), share * cluster.collective_seconds(flows, workers))


def data_parallel_epoch(cluster: Cluster, images: int, steps: int, flops: float, step: Sequence[Flow], workers: int) -> Seconds:
    """`images` of the whole epoch, shared by the workers (the largest share counts)."""
    return Seconds(
        training_seconds(cluster, flops * steps * math.ceil(images / steps / workers)), steps * cluster.collective_seconds(step, workers)
    )


def pipeline_step(
    cluster: Cluster, stage_flops: Sequence[float], crossing_bytes: Sequence[float], micro_batches: int, recompute: bool
) -> Seconds:
    """One step: fill and drain. `stage_flops` and `crossing_bytes` of one micro-batch, for every stage and every cut."""
    forward = [flops / cluster.flops_per_second for flops in stage_flops]
    backward = [(BACKWARD_PER_FORWARD + recompute) * seconds for seconds in forward]
    ready = _through(forward, crossing_bytes, micro_batches, [0.0] * len(forward), cluster)
    end = _through(backward[::-1], crossing_bytes[::-1], micro_batches, ready[::-1], cluster)
    total = max(end)
    compute = max(micro_batches * (f + b) for f, b in zip(forward, backward, strict=True))
    return Seconds(compute, total - compute)


def _through(
    work: Sequence[float], crossing: Sequence[float], micro_batches: int, free_from: Sequence[float], cluster: Cluster
) -> list[float]:
    """When each stage is done, if micro-batches run through the stages in this order and a link carries one message at a time."""
    stage_free, link_free = list(free_from), [0.0] * len(crossing)
    for _ in range(micro_batches):
        arrived = 0.0
        for stage, seconds in enumerate(work):
            stage_free[stage] = max(stage_free[stage], arrived) + seconds
            if stage < len(crossing):
                link_free[stage] = max(link_free[stage], stage_free[stage]) + cluster.message_seconds(crossing[stage])
                arrived = link_free[stage]
    return stage_free
