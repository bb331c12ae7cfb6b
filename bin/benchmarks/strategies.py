"""Our baselines against their peers, taking turns in the same run: same network, cuts, ranks, batch, threads and optimiser.

`gpipe`: a training step of ours against torch.distributed.pipelining's ScheduleGPipe over gloo. `data-parallel`: ours against
DistributedDataParallel over gloo and Horovod's DistributedOptimizer. A step is forward, backward and SGD with momentum, on random images. Before anything is timed the
gradients of both sides are compared.
"""

import os
import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from loft_hpc.comm.messages import Messages
from loft_hpc.comm.start import start
from loft_hpc.comm.world import World
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.resnet import build
from loft_hpc.pipeline.pipeline import Pipeline
from loft_hpc.pipeline.stages import Stage, check_split, cuts, parts
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.device import place
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation, Optimisation
from loft_hpc.training.trainer import FlatSGD, Trainer, stop_statistics

Step = tuple[Callable[[], None], Callable[[], list[Tensor]]]
"""(one training step, the gradients that it left)."""


class Case:
    """What both sides train."""

    def __init__(self, world: World, model: str, widen: float, image_size: int, batch: int, micro_batches: int, split: str):
        self.world, self.batch, self.micro_batches = world, batch, micro_batches
        self.architecture = architecture(model, 10, widen=widen)
        check_split(split)
        self.part = parts(self.architecture, cuts(self.architecture, split, world.size, image_size))[world.rank]
        self.outputs = self.architecture.block_outputs(image_size)
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, image_size, image_size, generator=draw).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), generator=draw)

    def network(self) -> nn.Module:
        network = build(self.architecture, seed=0).to(memory_format=torch.channels_last).train()
        stop_statistics(network)
        return network


OPTIMISATION = Optimisation(lr=0.01, schedule="constant")


def torch_sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=OPTIMISATION.weight_decay)


def our_gpipe(case: Case) -> Step:
    network, part, world = case.network(), case.part, case.world
    stage = Stage(network, part)
    own = {id(parameter) for parameter in stage.parameters()}
    buffer = ParameterBuffer({name: parameter for name, parameter in network.named_parameters() if id(parameter) in own})
    sgd = FlatSGD((buffer,), Schedule(OPTIMISATION, 1, 1))
    arriving = None if part.begins else case.outputs[part.first - 2]
    leaving = None if part.ends else case.outputs[part.last - 1]
    pipeline = Pipeline(
        stage, part, arriving, leaving, case.micro_batches, case.batch, Messages(world), world.rank, False, False, torch.device("cpu")
    )

    def step() -> None:
        sgd.zero_gradients()
        pipeline.step(case.images if part.begins else None, case.labels if part.ends else None)
        sgd.step(0)

    return step, lambda: [parameter.grad.clone() for parameter in stage.parameters()]


def their_gpipe(case: Case) -> Step:
    world, part = case.world, case.part
    # gloo refuses tensors that are not contiguous, so this side computes in torch's default memory format
    module = Stage(case.network().to(memory_format=torch.contiguous_format), part)
    images = case.images.contiguous()
    sgd = torch_sgd(module)
    schedule = ScheduleGPipe(
        PipelineStage(module, world.rank, world.size, torch.device("cpu")), case.micro_batches, loss_fn=F.cross_entropy
    )

    def step() -> None:
        sgd.zero_grad()
        schedule.step(*([images] if part.begins else []), **({"target": case.labels, "losses": []} if part.ends else {}))
        sgd.step()

    return step, lambda: [parameter.grad.clone() for parameter in module.parameters()]


def our_data_parallel(case: Case) -> Step:
    network, world = case.network(), case.world
    buffer = ParameterBuffer(dict(network.named_parameters()))
    trainer = Trainer(network, (buffer,), Schedule(OPTIMISATION, 1, 1), Computation())
    mine = (case.images[world.rank :: world.size].contiguous(memory_format=torch.channels_last), case.labels[world.rank :: world.size])

    def step() -> None:
        trainer.steps([[mine]], 0, case.batch, lambda: world.all_reduce_(buffer.gradient, "gradient")())

    return step, lambda: [parameter.grad.clone() for parameter in network.parameters()]


def their_data_parallel(case: Case) -> Step:
    world, network = case.world, case.network()
    parallel = DistributedDataParallel(network)
    sgd = torch_sgd(network)
    images = case.images[world.rank :: world.size].contiguous(memory_format=torch.channels_last)
    labels = case.labels[world.rank :: world.size]

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(parallel(images), labels).backward()
        sgd.step()

    return step, lambda: [parameter.grad.clone() for parameter in network.parameters()]


def horovods_data_parallel(case: Case) -> Step:
    """Horovod's own optimiser: an all-reduce for each parameter, fused by Horovod, begun while the backward pass goes on."""
    import horovod.torch  # after the world has started: mpi4py goes first

    world, network = case.world, case.network().to(memory_format=torch.contiguous_format)  # it refuses channels last
    sgd = horovod.torch.DistributedOptimizer(torch_sgd(network), network.named_parameters())
    images = case.images[world.rank :: world.size].contiguous()
    labels = case.labels[world.rank :: world.size]

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        sgd.step()

    return step, lambda: [parameter.grad.clone() for parameter in network.parameters()]


SIDES = {
    "gpipe": {"ours": our_gpipe, "ScheduleGPipe over gloo": their_gpipe},
    "data-parallel": {
        "ours: one all-reduce of a flat buffer": our_data_parallel,
        "DistributedDataParallel over gloo": their_data_parallel,
        "Horovod's DistributedOptimizer": horovods_data_parallel,
    },
}


def _compare(name: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if (one - other).norm() > 0.03 * other.norm():  # two memory formats use two kernels, whose rounding differs
            raise SystemExit(f"{name}: the two sides compute different gradients, by {float((one - other).norm() / other.norm()):.1e}")


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="resnet20", show_default=True)
@click.option("--widen", type=float, default=2, show_default=True)
@click.option("--image-size", type=int, default=32, show_default=True)
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--micro-batches", type=int, default=4, show_default=True)
@click.option("--split", default="balanced", show_default=True)
@click.option("--repetitions", type=click.IntRange(3), default=21, show_default=True)
def main(model: str, widen: float, image_size: int, batch_size: int, micro_batches: int, split: str, repetitions: int) -> None:
    world = start()
    _, placement = place("cpu", "float32", world)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    case = Case(world, model, widen, image_size, batch_size, micro_batches, split)
    if world.rank == 0:
        click.echo(
            f"{model} x{widen:g}, {image_size}x{image_size} images, batch {batch_size}, {micro_batches} micro-batches, split {split}, "
            f"{world.size} ranks of {placement.threads} threads, {repetitions} repetitions"
        )
    for name, makers in SIDES.items():
        sides = {label: make(case) for label, make in makers.items()}
        gradients = []
        for step, of in sides.values():
            step()
            gradients.append(of())
        for other in gradients[1:]:
            _compare(name, gradients[0], other)
        times: dict[str, list[float]] = {label: [] for label in sides}
        for _ in range(repetitions):
            for label, (step, _) in sides.items():
                world.barrier()
                begun = time.perf_counter()
                step()
                world.barrier()
                times[label].append(time.perf_counter() - begun)
        if world.rank == 0:
            ours = statistics.median(next(iter(times.values())))
            for label, values in times.items():
                low, median, high = statistics.quantiles(values, n=4)
                click.echo(
                    f"{name:14} {label:38} median {1e3 * median:7.1f} ms   quartiles {1e3 * low:.1f} to {1e3 * high:.1f}   ours is {ours / median:.2f} x this"
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
