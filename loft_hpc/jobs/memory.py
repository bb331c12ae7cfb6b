"""What a pretraining would hold in every rank's memory: its own buffers built on torch's meta device, where nothing has contents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from loft_hpc.analysis.memory import Activations, activations, storage_bytes
from loft_hpc.data.registry import DataShape
from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
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

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class RankMemory:
    """What rank `rank` holds, in bytes."""

    rank: int
    buffers: Buffers
    activations: int
    """Kept for the backward pass, at its largest: see `loft_hpc.analysis.memory`."""
    input_batch: int
    images: int
    """The data set, where it lies in memory."""
    initial_network: int
    """The parameters to start from, kept on the host's side."""
    evaluation_network: int
    """The full network that evaluations fill."""
    whole: int
    """The full network put together for an evaluation, a snapshot or a checkpoint (its momentum too, where checkpoints hold it)."""

    @property
    def total(self) -> int:
        """At its largest: activations are gone when the whole is put together."""
        lasting = self.buffers.total + self.images + self.initial_network + self.evaluation_network
        return lasting + max(self.activations + self.input_batch, self.whole)


@dataclass(frozen=True)
class _Seat:
    """What buffers are built by: which rank of how many. Nothing is sent."""

    rank: int
    size: int


def rank_memories(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, on_gpu: bool) -> list[RankMemory]:
    """Of every rank that holds something of its own: each stage of a pipeline; else rank 0 alone, which none exceeds.

    `on_gpu`: whether the buffers are those for a GPU.
    """
    of = {"loft": _loft, "data-parallel": _data_parallel, "gpipe": _pipeline}[settings.strategy]
    return list(of(settings, shape, network, workers, on_gpu))


def loft_buffers(
    settings: PretrainSettings, network: Architecture, workers: int, on_gpu: bool, rank: int = 0
) -> tuple[Buffers, SubNetwork]:
    """Of one worker, and the sub-network that they belong to."""
    groups = partitioned_groups(filter_groups(network), settings.loft.partition)
    sub = SubNetwork(network, groups, rank, workers, META, momentum_travels=_momentum_lasts(settings, workers))
    full = full_layout(_parameters(_full(network)), sub)
    transport = TRANSPORT_DTYPES[settings.loft.transport_dtype]
    on_gpu = on_gpu and workers > 1
    exchange = exchange_class(settings.loft.exchange, on_gpu)(sub, full, groups, _Seat(rank, workers), transport)
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


def data_parallel_buffers(network: Architecture) -> Buffers:
    full = _full(network)
    buffer = ParameterBuffer(_parameters(full))
    return Buffers(**_own((buffer,)), statistics=storage_bytes(full.buffers()), exchange=0, averaging=0)


def stage_buffers(settings: PretrainSettings, shape: DataShape, network: Architecture, part: Part) -> Buffers:
    full = _full(network)
    stage = Stage(full, part)
    parameters = _parameters(full)
    mine = part.parameters({name: tuple(parameter.shape) for name, parameter in parameters.items()}, network).shapes
    micro_batches = settings.pipeline.micro_batches
    messages: list[Tensor] = []
    for border in part.borders(network.block_outputs(shape.image_size)):
        messages += message_buffers(border, settings.batch_size // micro_batches, micro_batches, META)
    return Buffers(
        **_own((ParameterBuffer({name: parameters[name] for name in mine}),)),
        statistics=storage_bytes(stage.buffers()),
        exchange=storage_bytes(messages),
        averaging=0,
    )


def _loft(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    buffers, sub = loft_buffers(settings, network, workers, on_gpu)
    widths = {group.name: len(sub.network.get_parameter(group.filters)) for group in sub.groups}
    kept = _activations(settings, partial(_build, network, widths), _image(shape), settings.batch_size)
    yield _memory(settings, shape, network, workers, 0, buffers, kept.network + kept.result, settings.batch_size)


def _data_parallel(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    largest = -(-settings.batch_size // workers)
    kept = _activations(settings, partial(_build, network, {}), _image(shape), largest)
    yield _memory(settings, shape, network, workers, 0, data_parallel_buffers(network), kept.network + kept.result, largest)


def _pipeline(settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, on_gpu: bool) -> Iterator[RankMemory]:
    for rank, part in enumerate(parts(network, cuts(network, settings.pipeline.split, workers, shape.image_size))):
        kept = stage_activations(settings, shape, network, part)
        buffers = stage_buffers(settings, shape, network, part)
        yield _memory(settings, shape, network, workers, rank, buffers, kept, settings.batch_size if part.begins else 0)


def stage_activations(settings: PretrainSettings, shape: DataShape, network: Architecture, part: Part) -> int:
    """At its largest, which is when the backward pass begins or when it ends.

    Legend: of m micro-batches, i are through their backward pass. m - i have kept what they need for it (with recomputation: one at a
    time has), and the gradients of i + 1 inputs wait to be sent.
    """
    arriving, _ = part.borders(network.block_outputs(shape.image_size))
    m = settings.pipeline.micro_batches
    images = settings.batch_size // m
    kept = _activations(
        settings, lambda: Stage(_build(network, {}), part), arriving or _image(shape), images, begins=part.begins, ends=part.ends
    )
    gradient = images * FLOAT32_BYTES * torch.Size(arriving).numel() if arriving else 0

    def held(i: int) -> int:
        alive = 1 if settings.pipeline.recompute else m - i
        return alive * kept.network + (m - i) * kept.result + (i + 1) * gradient

    return max(held(0), held(m - 1))


def _memory(
    settings: PretrainSettings, shape: DataShape, network: Architecture, workers: int, rank: int, buffers: Buffers, kept: int, images: int
) -> RankMemory:
    full = _full(network)
    parameters = storage_bytes(full.parameters())
    pixels = images * torch.Size(_image(shape)).numel() * FLOAT32_BYTES
    return RankMemory(
        rank=rank,
        buffers=buffers,
        activations=kept,
        input_batch=pixels + images * LABEL_BYTES,
        images=shape.resident_bytes,
        initial_network=parameters,
        evaluation_network=parameters + storage_bytes(full.buffers()),
        whole=parameters * (1 + _momentum_lasts(settings, workers)),
    )


def _momentum_lasts(settings: PretrainSettings, workers: int) -> bool:
    """Whether momentum outlives a round, so that checkpoints hold it: everywhere but where LoFT starts it anew."""
    return settings.strategy != "loft" or settings.loft.momentum_across_rounds == "carry" or workers == 1


def _activations(
    settings: PretrainSettings,
    build: Callable[[], nn.Module],
    image: tuple[int, int, int],
    images: int,
    begins: bool = True,
    ends: bool = True,
) -> Activations:
    return activations(build, image, images, begins, ends, settings.computation.precision == "bfloat16")


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


def _full(network: Architecture) -> ResidualNetwork:
    with META:
        return _build(network, {})


def _parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return dict(network.named_parameters())


def _image(shape: DataShape) -> tuple[int, int, int]:
    return shape.channels, shape.image_size, shape.image_size
