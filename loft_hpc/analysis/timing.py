"""Seconds per epoch from an alpha-beta model: what a cluster's latency, bandwidth and speed make of computation and bytes.

Legend: alpha latency of a message (s), B bandwidth of a link (bytes/s), F FLOP rate of a worker (FLOP/s), S workers,
n bytes; G ranks of a node, the first G on the first node and so on; alpha', B' of a rank's link inside its node,
alpha, B of a node's link to the others.

    ring all-reduce of n          2(S-1) max over links of (alpha + n / (S B))
    ring all-gather, n in all      (S-1) max over links of (alpha + n / (S B))
    all-to-all, n sent by a rank  (G-1) alpha' + (G-1)/(S-1) n / B' + (S-G) alpha + G (S-G)/(S-1) n / B
    message of n                  alpha + n / B

(Hockney's model; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".)
A ring's links are those that it uses: inside (G > 1), between nodes (S > G); docs/communication.md derives it all. A
forward pass costs the network's FLOPs, a backward pass twice as many. Computation and collectives take turns, as in
our strategies; in a pipeline they overlap, so its schedule is played through, message by message. Not in the model:
congestion, memory passes, evaluations.
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
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
    "ranks_per_node": (1, 1e6),
    "inside_latency_seconds": (0, 1e3),
    "inside_bandwidth_bytes_per_second": (1, 1e18),
}
"""From the least to the most that any cluster has; in between, all that is computed from them is a finite number."""
_NODE = ("ranks_per_node", "inside_latency_seconds", "inside_bandwidth_bytes_per_second")
DEVICES = ("cpu", "cuda")
_STEPS = {"allreduce": 2, "allgather": 1, "broadcast": 1}
"""Of a ring (or chain) of S ranks, in multiples of S - 1."""


@dataclass(frozen=True)
class Link:
    """What messages go through."""

    latency_seconds: float
    bandwidth_bytes_per_second: float

    def seconds(self, messages: int, size: float) -> float:
        """For so many messages of `size` bytes together, one after the other."""
        return messages * self.latency_seconds + size / self.bandwidth_bytes_per_second


@dataclass(frozen=True)
class Cluster:
    """A cluster, as a TOML file describes it."""

    name: str
    latency_seconds: float
    """Of one message between two nodes; between any two ranks, where no node is described."""
    bandwidth_bytes_per_second: float
    """Of one node's link to the others, each way, shared by its ranks; of one rank's, where no node is described."""
    flops_per_second: float
    """What one worker sustains in training."""
    source: str = ""
    """Where the figures come from."""
    device: str = ""
    """What a worker is, one of `DEVICES`; empty where the file does not say."""
    ranks_per_node: int = 1
    inside_latency_seconds: float | None = None
    """Of one message between two ranks of a node."""
    inside_bandwidth_bytes_per_second: float | None = None
    """Of one rank's link to another of its node, each way."""

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
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        missing = sorted(needed - values.keys())
        if missing:
            raise LoftError(f"{path} lacks {', '.join(missing)}: a cluster needs " + ", ".join(sorted(needed)))
        strange = sorted(values.keys() - known)
        if strange:
            raise LoftError(f"{path} has {strange[0]}, which no cluster has: its keys are {', '.join(sorted(known))}")
        absent = [key for key in _NODE if key not in values]
        if 0 < len(absent) < len(_NODE):
            raise LoftError(f"{path} lacks {', '.join(absent)}: a node needs {', '.join(_NODE)}, or none of them")
        for key, (least, most) in _BOUNDS.items():
            value, kinds, kind = values.get(key, least), (int, float), "a number"
            if key == "ranks_per_node":
                kinds, kind = (int,), "a whole number"
            if type(value) not in kinds or not least <= value <= most:
                raise LoftError(f"{path}: {key} must be {kind} from {least} to {most:g}")
        for key in ("name", "source", "device"):
            if not isinstance(values.get(key, ""), str):
                raise LoftError(f"{path}: {key} must be a text in quotation marks")
        if values.get("device", "") not in ("", *DEVICES):
            raise LoftError(f"{path}: device must be one of {', '.join(DEVICES)}, or be left out")
        return cls(**values)

    def placed(self, ranks_per_node: int | None) -> "Cluster":
        """The same with so many ranks on each node; as it is where that is not known, or where no node is described."""
        if ranks_per_node is None or self.inside_latency_seconds is None:
            return self
        return replace(self, ranks_per_node=ranks_per_node)

    @property
    def described(self) -> str:
        """Its figures, for people."""
        links = f"{self.latency_seconds:g} s, {self.bandwidth_bytes_per_second / 1e9:.3g} GB/s"
        if self.ranks_per_node > 1:
            inside = f"{self.inside_latency_seconds:g} s, {self.inside_bandwidth_bytes_per_second / 1e9:.3g} GB/s inside"
            links += f" between nodes of {self.ranks_per_node} ranks, {inside}"
        return f"{links}, {self.flops_per_second:g} FLOP/s per worker"

    @property
    def _between(self) -> Link:
        return Link(self.latency_seconds, self.bandwidth_bytes_per_second)

    @property
    def _inside(self) -> Link:
        if self.inside_latency_seconds is None or self.inside_bandwidth_bytes_per_second is None:
            return self._between
        return Link(self.inside_latency_seconds, self.inside_bandwidth_bytes_per_second)

    def message_seconds(self, size: float, receiver: int) -> float:
        """For a message of `size` bytes to rank `receiver` from the rank before it."""
        return (self._inside if receiver % self.ranks_per_node else self._between).seconds(1, size)

    def collective_seconds(self, flows: Sequence[Flow], workers: int) -> float:
        """The collectives of `flows`, one after the other."""
        of = {"alltoall": self._all_to_all}
        return sum(of.get(flow.operation, self._ring)(flow, workers) for flow in flows)

    def _ring(self, flow: Flow, workers: int) -> float:
        """As if all links were the slowest, which carries its messages one after the other. One rank leaves a node."""
        used = [self._inside] if min(self.ranks_per_node, workers) > 1 else []
        if workers > self.ranks_per_node:
            used.append(self._between)
        messages = flow.calls * _STEPS[flow.operation] * (workers - 1)
        return max(link.seconds(messages, flow.largest_rank_bytes) for link in used)

    def _all_to_all(self, flow: Flow, workers: int) -> float:
        """A rank's messages, one after the other; those that leave the node share its link with its other ranks'."""
        mates = min(self.ranks_per_node, workers)
        own, shared = (mates - 1) / (workers - 1), mates * (workers - mates) / (workers - 1)
        inside = self._inside.seconds(flow.calls * (mates - 1), own * flow.largest_rank_bytes)
        return inside + self._between.seconds(flow.calls * (workers - mates), shared * flow.largest_rank_bytes)


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
    """`images` of one step on the worker that has most of them."""
    return Seconds(training_seconds(cluster, flops * steps * images), steps * cluster.collective_seconds(step, workers))


def pipeline_step(
    cluster: Cluster, stage_flops: Sequence[float], crossing_bytes: Sequence[float], micro_batches: int, recompute: bool
) -> Seconds:
    """One step: fill and drain. `stage_flops` and `crossing_bytes` of one micro-batch, for every stage and every cut."""
    messages = [cluster.message_seconds(size, receiver) for receiver, size in enumerate(crossing_bytes, start=1)]
    forward = [flops / cluster.flops_per_second for flops in stage_flops]
    backward = [(BACKWARD_PER_FORWARD + recompute) * seconds for seconds in forward]
    ready = _through(forward, messages, micro_batches, [0.0] * len(forward))
    end = _through(backward[::-1], messages[::-1], micro_batches, ready[::-1])
    total = max(end)
    compute = max(micro_batches * (f + b) for f, b in zip(forward, backward, strict=True))
    return Seconds(compute, total - compute)


def _through(
    work: Sequence[float], messages: Sequence[float], micro_batches: int, free_from: Sequence[float]
) -> list[float]:  # fmt: skip
    """When each stage is done, if micro-batches run through in this order and a link carries one message at a time.

    Seconds: of a stage's work, and of a message to the next one.
    """
    stage_free, link_free = list(free_from), [0.0] * len(messages)
    for _ in range(micro_batches):
        arrived = 0.0
        for stage, seconds in enumerate(work):
            stage_free[stage] = max(stage_free[stage], arrived) + seconds
            if stage < len(messages):
                link_free[stage] = max(link_free[stage], stage_free[stage]) + messages[stage]
                arrived = link_free[stage]
    return stage_free
