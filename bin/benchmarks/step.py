"""Images per second of a training step, of the whole network and of a LoFT worker's sub-network, against a plain PyTorch loop.

One process, on the GPU if there is one (RANKS=1 bin/bench step). Each of our steps is timed in turn with the plain loop's on the same batch:
torch's SGD over the network's own parameters, gradients set to none, layouts and precision as said.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F

from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation, Optimisation
from loft_hpc.training.trainer import Trainer
from loft_hpc.training.trainer import compiled as compile_network

OPTIMISATION = Optimisation(lr=0.01)
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A network to step: the whole one, or worker 0's of so many."""

    model: str
    workers: int
    batch: tuple[torch.Tensor, torch.Tensor]
    precision: str
    unit: int

    @property
    def _groups(self):
        return partitioned_groups(filter_groups(self._architecture), "paper", self.unit) if self.workers > 1 else []

    @property
    def _architecture(self):
        return architecture(self.model, 10, 3, "cifar", None)

    def ours(self, compiled: bool) -> Step:
        device, (images, labels) = self.batch[0].device, self.batch
        if self.workers > 1:
            sub = SubNetwork(self._architecture, self._groups, 0, self.workers, device, momentum_travels=False)
            network, buffers = sub.network, (sub.shared, sub.partitioned)
        else:
            network = build(self._architecture, seed=0).to(device, memory_format=torch.channels_last)
            buffers = (ParameterBuffer(dict(network.named_parameters())),)
        trainer = Trainer(network, buffers, Schedule(OPTIMISATION, 1_000_000, 1), Computation(precision=self.precision, compile=compiled))
        return lambda: trainer.steps([[(images, labels)]], 0) and None

    def plain(self, layout: torch.memory_format, compiled: bool) -> Step:
        device, (images, labels) = self.batch[0].device, self.batch
        widths = {name: part.shape[0] for name, part in self._sub_widths().items()} if self.workers > 1 else None
        network = build(self._architecture, widths, seed=0).to(device, memory_format=layout).train()
        images = images.contiguous(memory_format=layout)
        sgd = torch.optim.SGD(
            network.parameters(), lr=OPTIMISATION.lr, momentum=OPTIMISATION.momentum, weight_decay=OPTIMISATION.weight_decay
        )
        forward = compile_network(network) if compiled else network

        def step() -> None:
            sgd.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                output = forward(images)
            F.cross_entropy(output.float(), labels).backward()
            sgd.step()

        return step

    def _sub_widths(self) -> dict[str, torch.Tensor]:
        state = SubNetwork(
            self._architecture, self._groups, 0, self.workers, torch.device("cpu"), momentum_travels=False
        ).network.state_dict()
        return {group.name: state[group.filters] for group in self._groups}


def timed(steps: dict[str, Step], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step, all of them in turn; warm."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(-3, repetitions):
        for name, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            if repetition >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def sides(case: Case, compiled: bool) -> Iterator[tuple[str, Step]]:
    yield "ours", case.ours(compiled)
    yield "plain, channels last", case.plain(torch.channels_last, compiled)
    if not compiled:
        yield "plain, contiguous", case.plain(torch.contiguous_format, compiled)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="wideresnet34", show_default=True)
@click.option("--workers", type=click.IntRange(2), default=4, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=128, show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--compile", "with_compile", is_flag=True, help="Both sides through torch.compile as well.")
@click.option("--partition-unit", type=click.IntRange(1), default=1, show_default=True, help="As of loft pretrain.")
@click.option("--repetitions", type=click.IntRange(3), default=21, show_default=True)
def main(
    model: str, workers: int, batch_size: int, precisions: tuple[str, ...], with_compile: bool, partition_unit: int, repetitions: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    )
    click.echo(f"{model} on 32x32 images, batch {batch_size}, {repetitions} repetitions, torch {torch.__version__}, {name}")
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (batch_size,), device=device)
    for precision in precisions:
        for compiled in (False, True) if with_compile else (False,):
            for count in (1, workers):
                times = timed(dict(sides(Case(model, count, batch, precision, partition_unit), compiled)), repetitions, device)
                ours = statistics.median(times["ours"])
                for side, values in times.items():
                    low, median, high = (batch_size / seconds for seconds in statistics.quantiles(values, n=4)[::-1])
                    what = "dense" if count == 1 else f"LoFT-{count} worker"
                    click.echo(
                        f"{what:13} {precision:8} {'compiled' if compiled else 'eager':8} {side:21} median {median:9.1f} images/s   "
                        f"quartiles {low:.1f} to {high:.1f}   ours takes {ours / statistics.median(values):.2f} x its time"
                    )
            torch.compiler.reset()


if __name__ == "__main__":
    main()
