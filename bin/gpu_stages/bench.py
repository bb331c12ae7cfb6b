"""Milliseconds of a training step in one process: the dense network, workers of LoFT and pruned networks, by our trainer and by a plain PyTorch loop.

Legend: `launch` is when the CPU is done with a step, `step` when the device is, `streamed` the mean of steps that follow one another. A
case is timed after 5 steps that are not, ours and the plain loop's on the same batch. `with input`: images are drawn and augmented too.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from loft_hpc.analysis.size import network_size
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import Batch, DataInfo, PixelRange, TensorDataSet
from loft_hpc.data.order import Order
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.models.scores import removed_count
from loft_hpc.training.buffers import ParameterBuffer
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Computation, Optimisation
from loft_hpc.training.trainer import Trainer, stop_statistics
from loft_hpc.training.trainer import compiled as compile_network

OPTIMISATION = Optimisation(lr=0.01)
Step = Callable[[], object]
Widths = dict[str, int] | None


def cases(network: Architecture) -> dict[str, Widths]:
    """Hidden filters of each block, None for all."""
    groups = filter_groups(network)
    found: dict[str, Widths] = {"dense": None}
    for workers, unit in ((2, 1), (4, 1), (3, 1), (3, 8)):
        name = f"LoFT-{workers} worker" + (f", unit {unit}" if unit > 1 else "")
        found[name] = {group.name: group.shares(workers)[0] for group in partitioned_groups(groups, "paper", unit)}
    for ratio in (0.5, 0.8):
        kept = {group.name: group.width - removed_count(group.width, ratio) for group in groups}
        found |= {f"pruned {ratio}": kept, f"pruned {ratio}, to 8": {name: -(-width // 8) * 8 for name, width in kept.items()}}
    return found


class Bench:
    """Times steps of networks on one device."""

    def __init__(self, network: Architecture, size: int, device: torch.device, steps: int):
        self._network, self._size, self._device, self._steps = network, size, device, steps
        self.rows: list[dict] = []

    def images(self, batch: int) -> Batch:
        images = torch.randn(batch, self._network.in_channels, self._size, self._size, device=self._device)
        return images.contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,), device=self._device)

    def row(self, case: str, widths: Widths, side: str, precision: str, batch: int, step: Step) -> None:
        """Time it, and say so."""
        self._set_precision(precision)
        launch, alone, streamed = self._time(step)
        flops = 3 * network_size(self._network, widths, self._size).flops * batch  # a training step takes three forward passes' worth
        self.rows.append(
            {
                "case": case, "side": side, "precision": precision, "batch": batch, "launch_ms": launch, "step_ms": alone,
                "streamed_ms": streamed, "tflops_per_second": flops / streamed / 1e9,
            }
        )  # fmt: skip
        click.echo(
            f"{case:18} {side:16} {precision:8} batch {batch:4d}  launch {launch:7.2f}  step {alone:7.2f}  streamed {streamed:7.2f} ms  "
            f"{batch / streamed * 1e3:9.0f} images/s  {flops / streamed / 1e9:6.1f} TFLOP/s"
        )

    def ours(self, widths: Widths, precision: str, feed: Iterator[Batch], compiled: bool = False) -> Step:
        network = build(self._network, widths, seed=0).to(self._device, memory_format=torch.channels_last)
        buffers = (ParameterBuffer(dict(network.named_parameters())),)
        trainer = Trainer(network, buffers, Schedule(OPTIMISATION, 10**6, 1), Computation(precision=precision, compile=compiled))
        return lambda: trainer.steps([[next(feed)]], 0)

    def plain(self, widths: Widths, precision: str, batch: Batch, compiled: bool = False) -> Step:
        network = build(self._network, widths, seed=0).to(self._device, memory_format=torch.channels_last).train()
        stop_statistics(network)
        sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        forward = compile_network(network) if compiled else network

        def step() -> None:
            sgd.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                output = forward(batch[0])
            F.cross_entropy(output.float(), batch[1]).backward()
            sgd.step()

        return step

    def _set_precision(self, precision: str) -> None:
        if self._device.type == "cuda":
            exact = "tf32" if precision == "tf32" else "ieee"
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = exact

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _time(self, step: Step) -> tuple[float, float, float]:
        """Medians of launch and step, mean of streamed steps, in milliseconds."""
        for _ in range(5):
            step()
        self._wait()
        launches, alone = [], []
        for _ in range(self._steps):
            began = time.perf_counter()
            step()
            launches.append(time.perf_counter() - began)
            self._wait()
            alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(self._steps):
            step()
        self._wait()
        streamed = (time.perf_counter() - began) / self._steps
        return statistics.median(launches) * 1e3, statistics.median(alone) * 1e3, streamed * 1e3


def synthetic(channels: int, size: int, device: torch.device) -> TensorDataSet:
    """Random bytes, augmented as CIFAR is."""
    pixels, labels = torch.randint(0, 256, (4096, channels, size, size), dtype=torch.uint8), torch.randint(0, 10, (4096,))
    info = DataInfo("synthetic", 10, channels, size, "cifar", len(pixels), len(pixels), fingerprint="", synthetic=True)
    mean = std = (0.3,) * channels
    return TensorDataSet(
        info, (pixels, labels), (pixels, labels), Augmentation(4, True, mean, std), PixelRange.normalised(mean, std), device
    )


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--model", default="preresnet34", show_default=True)
@click.option("--widen", type=float, default=2, show_default=True)
@click.option("--size", type=int, default=32, show_default=True, help="Pixels per side.")
@click.option("--channels", type=int, default=1, show_default=True)
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(128, 512), show_default=True)
@click.option("--seconds", type=float, default=90, show_default=True, help="After which no further case begins.")
def main(device: str, model: str, widen: float, size: int, channels: int, steps: int, batches: tuple[int, ...], seconds: float) -> None:
    began, where = time.perf_counter(), torch.device(device)
    on_gpu = where.type == "cuda"
    network = architecture(model, 10, channels, "cifar", widen)
    bench, widths = Bench(network, size, where, steps), cases(network)
    click.echo(
        f"{model}, widen {widen:g}, {size}x{size}x{channels}, torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'CPU'}"
    )

    def left() -> bool:
        return time.perf_counter() - began < seconds

    def forever(batch: Batch) -> Iterator[Batch]:
        while True:
            yield batch

    precisions = ("bfloat16", "tf32", "float32") if on_gpu else ("float32",)
    for count in batches:
        batch = bench.images(count)
        for precision in precisions:
            for case, kept in widths.items():
                if left():
                    bench.row(case, kept, "ours", precision, count, bench.ours(kept, precision, forever(batch)))
                    if count == batches[0] or case == "dense":
                        bench.row(case, kept, "plain", precision, count, bench.plain(kept, precision, batch))
    count, precision, data = batches[0], precisions[0], synthetic(channels, size, where)
    batch = bench.images(count)
    for case in ("dense", "LoFT-4 worker", "pruned 0.8"):
        feed = data.train_batches(Order("replicated", 4096, count, 0, 0, 1), 0, 10**6)
        bench.row(case, widths[case], "ours, with input", precision, count, bench.ours(widths[case], precision, feed))
        if on_gpu and left():
            bench.row(case, widths[case], "ours, compiled", precision, count, bench.ours(widths[case], precision, forever(batch), True))
            bench.row(case, widths[case], "plain, compiled", precision, count, bench.plain(widths[case], precision, batch, True))
    if on_gpu:
        click.echo(f"memory allocated at most {torch.cuda.max_memory_allocated() >> 20} MiB")
    (Path(os.environ.get("OUT", ".")) / "bench.json").write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
