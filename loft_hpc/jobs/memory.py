"""What a training would hold in a rank's memory: its own buffers on torch's meta device, where nothing has contents.

For ranks on GPUs no GPU need be there. What differs from ranks on CPUs: the exchange's own buffers and tables
(filterwise/gpu_exchange.py); the initial network stays in host memory, and what ranks exchange is copied through that
unless Horovod has NCCL and every rank a GPU of its own (comm/staging.py); and the next batch of image files is made
ready while one is computed on (data/loader.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loft_hpc.analysis.memory import Activations, activations, storage_bytes
from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.jobs.prediction import Case, division_of
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups, shares
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.pipeline.pipeline import message_buffers
from loft_hpc.pipeline.stages import Part, Stage, cuts, parts
from loft_hpc.training.buffers import ParameterBuffer

META = torch.device("meta")
FLOAT32_BYTES, LABEL_BYTES = 4, 8


@dataclass(frozen=True)
class Buffers:
    """Of one rank, in bytes: allocated once, and held for the whole training."""

    parameters: int
    gradients: int
    momentum: int
    statistics: int
    """Normalisations' running mean and variance, which training neither fills nor reads."""
    exchange: int
    """Of the filters that leave and arrive, or of a pipeline's messages."""
    averaging: int
    """What the shared parameters' changes are measured against and travel in."""
    mask: int = 0
    """0 or 1 for every parameter, where single weights are held at zero."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class RankMemory:
    """What rank `rank` holds, in bytes."""

    rank: int
    on_gpu: bool
    buffers: Buffers
    activations: int
    """Kept for the backward pass, at its largest: see `loft_hpc.analysis.memory`."""
    input_batch: int
    next_batch: int
    """On a GPU: what is made ready of the next batch of image files, its bytes and its pixels."""
    images: int
    """The whole data set, where it lies in memory."""
    initial_network: int
    """The parameters that the training starts from, in host memory."""
    evaluation_network: int
    """The full network that evaluations fill."""
    whole: int
    """The full network put together for an evaluation, a snapshot or a checkpoint (its momentum too, where checkpoints hold it)."""
    staging: int
    """On a GPU: pinned host memory for exchanges, unless Horovod has NCCL and every rank a GPU of its own."""

    @property
    def total(self) -> int:
        """At its largest, on the device: activations are gone when the whole is put together."""
        lasting = self.buffers.total + self.images + self.evaluation_network
        lasting += 0 if self.on_gpu else self.initial_network
        return lasting + max(self.activations + self.input_batch + self.next_batch, self.whole)

    @property
    def host(self) -> int:
        """In host memory beside a GPU."""
        return self.initial_network + self.staging if self.on_gpu else 0


@dataclass(frozen=True)
class _Seat:
    """What buffers are built by: which rank of how many. Nothing is sent."""

    rank: int
    size: int


def rank_memories(case: Case, workers: int, on_gpu: bool) -> list[RankMemory]:
    """Of every rank that holds something of its own: each stage of a pipeline; else rank 0 alone, which none exceeds.

    `on_gpu`: whether the ranks compute on GPUs.
    """
    of = {"loft": _loft, "data-parallel": _data_parallel, "gpipe": _pipeline}[case.settings.strategy]
    return list(of(case, workers, on_gpu))


def loft_buffers(case: Case, workers: int, on_gpu: bool, rank: int = 0) -> tuple[Buffers, SubNetwork]:
    """Of one worker, and the sub-network that they belong to."""
    groups = partitioned_groups(filter_groups(case.network), case.settings.loft.partition, case.settings.loft.partition_unit)
    sub = SubNetwork(case.network, groups, rank, workers, META, momentum_travels=_momentum_lasts(case, workers))
    full = full_layout(_parameters(_full(case)), sub)
    transport = TRANSPORT_DTYPES[case.settings.loft.transport_dtype]
    on_gpu = on_gpu and workers > 1
    exchange = exchange_class(case.settings.loft.exchange, on_gpu)(sub, full, groups, _Seat(rank, workers), transport)
    own = (sub.shared, sub.partitioned)
    known = [buffer.content for buffer in own]
    return (
        Buffers(
            **_own(own),
            statistics=storage_bytes(sub.network.buffers()),
            exchange=storage_bytes(_tensors(exchange), known) + (exchange.addresses.table_bytes if on_gpu else 0),
            averaging=storage_bytes(_tensors(exchange.averaging), known),
        ),
        sub,
    )


def loft_staging(case: Case, workers: int, sub: SubNetwork, rank: int = 0) -> int:
    """Pinned host copies of what a worker broadcasts, exchanges and merges, in bytes: of an all-to-all, at most.

    Legend: P partitioned and C shared parameters, of which this worker holds P_s; S workers; e bytes of an element in
    transport. There is a copy of each tensor that enters a collective, and of each that leaves it, but for all-reduce
    and broadcast, which are in place.
    """
    if workers == 1:
        return 0
    settings, copies = case.settings.loft, 2 if sub.momentum_travels else 1
    divided, e = division_of(case.network, settings.partition, settings.partition_unit), TRANSPORT_DTYPES[settings.transport_dtype].itemsize
    P, C, P_s = divided.partitioned, divided.shared, sub.partitioned.layout.numel
    start = FLOAT32_BYTES * (P + C)
    moving = e * copies * (P_s + (P if settings.exchange == "allgather" else P_s))
    averaging = FLOAT32_BYTES * copies * C
    if e != FLOAT32_BYTES:
        averaging = e * (2 * copies * C + (workers + 1) * shares(copies * C, workers)[rank])
    merged_by_message = settings.exchange != "allgather" or e != FLOAT32_BYTES
    return start + moving + averaging + FLOAT32_BYTES * (P_s + P) * merged_by_message


def data_parallel_buffers(case: Case) -> Buffers:
    full = _full(case)
    buffer = ParameterBuffer(_parameters(full))
    mask = storage_bytes([buffer.values]) if case.masked else 0
    return Buffers(**_own((buffer,)), statistics=storage_bytes(full.buffers()), exchange=0, averaging=0, mask=mask)


def stage_buffers(case: Case, part: Part) -> Buffers:
    full = _full(case)
    stage = Stage(full, part)
    parameters = _parameters(full)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    mine = part.parameters(shapes, case.network).shapes
    micro_batches = case.settings.pipeline.micro_batches
    messages: list[Tensor] = []
    for border in part.borders(case.network.block_outputs(case.shape.image_size)):
        messages += message_buffers(border, case.settings.batch_size // micro_batches, micro_batches, META)
    return Buffers(
        **_own((ParameterBuffer({name: parameters[name] for name in mine}),)),
        statistics=storage_bytes(stage.buffers()),
        exchange=storage_bytes(messages),
        averaging=0,
    )


def _loft(case: Case, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    buffers, sub = loft_buffers(case, workers, on_gpu)
    widths = {group.name: len(sub.network.get_parameter(group.filters)) for group in sub.groups}
    kept = _activations(case, lambda: _build(case.network, widths), _image(case), case.settings.batch_size)
    kept_bytes, staging = kept.network + kept.result, loft_staging(case, workers, sub)
    yield _memory(case, workers, on_gpu, 0, buffers, kept_bytes, case.settings.batch_size, staging)


def _data_parallel(case: Case, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    parts = case.largest_share(workers)
    kept = _activations(case, lambda: _build(case.network, case.widths), _image(case), parts[0])
    buffers = data_parallel_buffers(case)
    staging = buffers.parameters + buffers.gradients if workers > 1 else 0
    yield _memory(case, workers, on_gpu, 0, buffers, kept.network + kept.result, sum(parts), staging)


def _pipeline(case: Case, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    whole = storage_bytes(_full(case).parameters())
    where = cuts(case.network, case.settings.pipeline.split, workers, case.shape.image_size)
    for rank, part in enumerate(parts(case.network, where)):
        kept, buffers = stage_activations(case, part), stage_buffers(case, part)
        images = case.settings.batch_size if part.begins else 0
        # every message received and sent, and the merge of all stages
        staging = 2 * buffers.exchange + buffers.parameters + whole if workers > 1 else 0
        yield _memory(case, workers, on_gpu, rank, buffers, kept, images, staging)


def stage_activations(case: Case, part: Part) -> int:
    """At its largest, which is when the backward pass begins or when it ends.

    Legend: of m micro-batches, i are through their backward pass. m - i have kept what they need for it (with recomputation: one at a
    time has), and the gradients of i + 1 inputs wait to be sent.
    """
    arriving, _ = part.borders(case.network.block_outputs(case.shape.image_size))
    m, recompute = case.settings.pipeline.micro_batches, case.settings.pipeline.recompute
    images = case.settings.batch_size // m
    kept = _activations(
        case,
        lambda: Stage(_build(case.network, {}), part),
        arriving or _image(case),
        images,
        begins=part.begins,
        ends=part.ends,
    )
    gradient = images * FLOAT32_BYTES * torch.Size(arriving).numel() if arriving else 0

    def held(i: int) -> int:
        alive = 1 if recompute else m - i
        return alive * kept.network + (m - i) * kept.result + (i + 1) * gradient

    return max(held(0), held(m - 1))


def _memory(
    case: Case, workers: int, on_gpu: bool, rank: int, buffers: Buffers, kept: int, images: int, staging: int
) -> RankMemory:  # fmt: skip
    """`kept` activations in bytes, `images` of a batch on this rank, `staging` of ranks on GPUs in bytes."""
    full = _full(case)
    parameters = storage_bytes(full.parameters())
    values = images * torch.Size(_image(case)).numel()
    batch = values * FLOAT32_BYTES + images * LABEL_BYTES
    from_files = case.shape.pixel_bytes == 0
    return RankMemory(
        rank=rank,
        on_gpu=on_gpu,
        buffers=buffers,
        activations=kept,
        input_batch=batch,
        next_batch=values + batch if on_gpu and from_files else 0,
        images=case.shape.resident_bytes,
        initial_network=parameters,
        evaluation_network=parameters + storage_bytes(full.buffers()),
        whole=parameters * (1 + _momentum_lasts(case, workers)),
        staging=staging if on_gpu else 0,
    )


def _momentum_lasts(case: Case, workers: int) -> bool:
    """Whether momentum outlives a round, so that checkpoints hold it: everywhere but where LoFT starts it anew."""
    settings = case.settings
    return settings.strategy != "loft" or settings.loft.momentum_across_rounds == "carry" or workers == 1


def _activations(
    case: Case,
    build: Callable[[], nn.Module],
    image: tuple[int, int, int],
    images: int,
    begins: bool = True,
    ends: bool = True,
) -> Activations:
    return activations(build, image, images, begins, ends, case.settings.computation.precision == "bfloat16")


def _own(buffers: Sequence[ParameterBuffer]) -> dict[str, int]:
    parameters = sum(FLOAT32_BYTES * buffer.layout.numel for buffer in buffers)
    with_momentum = storage_bytes(tensor for buffer in buffers for tensor in (buffer.values, buffer.momentum))
    return {
        "parameters": parameters,
        "gradients": storage_bytes(buffer.gradient for buffer in buffers),
        "momentum": with_momentum - parameters,
    }


def _tensors(owner: object) -> list[Tensor]:
    return [value for value in vars(owner).values() if isinstance(value, Tensor)]


def _build(network: Architecture, widths: Mapping[str, int]) -> ResidualNetwork:
    return ResidualNetwork(network, network.hidden_widths() | dict(widths))


def _full(case: Case) -> ResidualNetwork:
    with META:
        return _build(case.network, case.widths)


def _parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return dict(network.named_parameters())


def _image(case: Case) -> tuple[int, int, int]:
    return case.shape.channels, case.shape.image_size, case.shape.image_size
