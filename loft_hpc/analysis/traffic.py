"""What every strategy sends, in closed form: the ledger that a run must have.

Legend: S workers; P partitioned and C shared parameters of LoFT, N = P + C; D parameters that change hands between two deals; e bytes
of an element in transport; R rounds; T steps; B images of a batch; a_k elements of one image's activation at cut k. Sums are over all
ranks. Wire costs are the textbook's (docs/communication.md): ring all-reduce 2(S-1) n, ring all-gather and chain broadcast (S-1) n.

    LoFT, a round, all-gather     S P delivered, (S-1) P on the wire
    LoFT, a round, all-to-all     D delivered and on the wire; D = (1 - 1/S) P on average
      and the shared ones         all-reduce of C; in a 16-bit type all-to-all of (S-1) C and all-gather of C
    data-parallel, a step         all-reduce of N
    gpipe, a step                 B a_k forward and B a_k back at every cut
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loft_hpc.comm.ledger import Entry, Ledger
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import FilterGroup, filter_groups, member_names, partitioned_groups
from loft_hpc.models.resnet import ResidualNetwork

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Division:
    """How a partition rule divides a network's trainable parameters."""

    partitioned: int
    shared: int
    groups: tuple[tuple[FilterGroup, int], ...] = ()
    """Each dealt group with the parameters of one of its filters."""

    @property
    def total(self) -> int:
        return self.partitioned + self.shared

    def moved(self, filters: Mapping[str, int]) -> int:
        """D, for the number of each group's filters that change hands."""
        return sum(filters[group.name] * parameters for group, parameters in self.groups)

    def moved_on_average(self, workers: int) -> float:
        """D over random deals: a filter of worker s stays with probability (its share of the group)."""
        total = 0.0
        for group, parameters in self.groups:
            total += parameters * (group.width - sum(share * share for share in group.shares(workers)) / group.width)
        return total


def division(network: Architecture, rule: str = "paper", unit: int = 1) -> Division:
    """Count P and C, normalisations' weights and biases included."""
    groups = partitioned_groups(filter_groups(network), rule, unit)
    dealt = member_names(groups)
    with torch.device("meta"):
        parameters = {name: p.numel() for name, p in ResidualNetwork(network, network.hidden_widths()).named_parameters()}
    partitioned = sum(count for name, count in parameters.items() if name in dealt)
    per_group = tuple((group, sum(parameters.get(name, 0) for name, _ in group.members) // group.width) for group in groups)
    return Division(partitioned, sum(parameters.values()) - partitioned, per_group)


@dataclass(frozen=True)
class Flow:
    """What one operation with one purpose carries, all ranks together, in bytes."""

    operation: str
    purpose: str
    payload_sent_bytes: int
    payload_received_bytes: int
    wire_bytes: int
    largest_rank_bytes: float
    """What the busiest rank puts on the wire, where ranks differ only by rounding: for the time model."""
    calls: int = 1
    """Calls of the busiest rank."""

    def times(self, count: int) -> "Flow":
        fields = ("payload_sent_bytes", "payload_received_bytes", "wire_bytes", "largest_rank_bytes", "calls")
        return replace(self, **{name: getattr(self, name) * count for name in fields})


def all_reduce(elements: int, element_bytes: int, workers: int, purpose: str) -> Flow:
    n = elements * element_bytes
    return Flow("allreduce", purpose, workers * n, workers * n, 2 * (workers - 1) * n, 2 * (workers - 1) * n / workers)


def all_gather(elements: int, element_bytes: int, workers: int, purpose: str) -> Flow:
    """Of `elements` over all ranks."""
    n = elements * element_bytes
    return Flow("allgather", purpose, n, workers * n, (workers - 1) * n, (workers - 1) * n / workers)


def all_to_all(moved: int, element_bytes: int, workers: int, purpose: str) -> Flow:
    n = moved * element_bytes
    return Flow("alltoall", purpose, n, n, n, n / workers)


def broadcast(elements: int, element_bytes: int, workers: int, purpose: str) -> Flow:
    n = elements * element_bytes
    return Flow("broadcast", purpose, n, (workers - 1) * n, (workers - 1) * n, n)


def loft_round(
    divided: Division,
    workers: int,
    exchange: str = "allgather",
    element_bytes: int = FLOAT32_BYTES,
    copies: int = 1,
    moved: int | None = None,
    average: bool = True,
) -> list[Flow]:
    """One exchange. `copies` is 2 where momentum travels along; `moved` is D, by default its average over deals; `average`: whether
    the round averages the shared parameters."""
    if workers == 1:
        return []
    if exchange == "allgather":
        partitioned = all_gather(divided.partitioned * copies, element_bytes, workers, "partitioned")
    else:
        moving = round(divided.moved_on_average(workers)) if moved is None else moved
        partitioned = all_to_all(moving * copies, element_bytes, workers, "partitioned")
    if not average:
        return [partitioned]
    shared = divided.shared * copies
    if element_bytes == FLOAT32_BYTES:
        return [partitioned, all_reduce(shared, element_bytes, workers, "shared")]
    return [
        partitioned,
        all_to_all((workers - 1) * shared, element_bytes, workers, "shared"),
        all_gather(shared, element_bytes, workers, "shared"),
    ]


def data_parallel_step(parameters: int, workers: int) -> list[Flow]:
    return [all_reduce(parameters, FLOAT32_BYTES, workers, "gradient")] if workers > 1 else []


def pipeline_step(crossing: Sequence[int], batch_size: int, micro_batches: int) -> list[Flow]:
    """`crossing`: elements of one image at every cut. A rank between two cuts sends activations over one, gradients over the other."""
    if not crossing:
        return []
    n = sum(crossing) * batch_size * FLOAT32_BYTES
    largest = max(crossing) * batch_size * FLOAT32_BYTES
    return [
        Flow(operation, purpose, n * sends, n * (not sends), n * sends, largest * sends, micro_batches)
        for operation, sends in (("send", True), ("receive", False))
        for purpose in ("activation", "gradient")
    ]


def crossing_elements(network: Architecture, image_size: int, cuts: Sequence[int]) -> list[int]:
    """Elements of one image's activation at each cut."""
    outputs = network.block_outputs(image_size)
    return [outputs[block - 1][0] * outputs[block - 1][1] * outputs[block - 1][2] for block in cuts]


def delivered(flows: Sequence[Flow]) -> int:
    """Payload that reaches workers."""
    return sum(flow.payload_received_bytes for flow in flows)


def handed_over(flows: Sequence[Flow]) -> int:
    """Payload that workers upload: the poster's accounting."""
    return sum(flow.payload_sent_bytes for flow in flows)


def as_ledger(flows: Sequence[Flow]) -> Ledger:
    """The sum over all ranks' ledgers that a run with these flows must have; calls are left at 0, being another thing per rank."""
    ledger = Ledger()
    for flow in flows:
        received = flow.wire_bytes if flow.operation != "receive" else flow.payload_received_bytes
        entry = Entry(
            payload_sent_bytes=flow.payload_sent_bytes,
            payload_received_bytes=flow.payload_received_bytes,
            wire_sent_bytes=flow.wire_bytes,
            wire_received_bytes=received if flow.operation != "send" else 0,
        )
        ledger.record(flow.operation, flow.purpose, entry)
    return ledger
