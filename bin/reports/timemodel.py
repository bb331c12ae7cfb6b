"""The alpha-beta time model against the clock: real trainings over network namespaces with rate-limited links, one host per rank.

Latency and bandwidth are measured by mpi4py messages between two of the hosts, the FLOP rate by one data-parallel training over
unlimited links; with these three numbers the model predicts every other row. Measured is the second epoch's training time. Collectives are pinned to the
textbook algorithms that the model speaks of, unless told otherwise.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click

from loft_hpc.analysis.size import network_size
from loft_hpc.analysis.timing import BACKWARD_PER_FORWARD, Cluster
from loft_hpc.data.registry import DataSettings, known_shape
from loft_hpc.filterwise.loft import LoftSettings
from loft_hpc.jobs.prediction import predict
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import architecture
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.training.settings import Snapshots

from hosts import Hosts, available
from kernel import TEXTBOOK, TrainingFailed, check

# Ranks wait for one another without filling a core, and ask Horovod's question often enough to add little to a collective.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HOROVOD_CYCLE_TIME": "1"}
BASE = PretrainSettings(
    model="resnet20", widen=4, epochs=2, batch_size=64, snapshots=Snapshots(snapshot_every="0"), data=DataSettings(dataset="digits"),
    loft=LoftSettings(local_iterations=4), pipeline=PipelineSettings(split="balanced"),
)  # fmt: skip
CASES = {
    "loft, allgather": replace(BASE, strategy="loft"),
    "loft, alltoall, bfloat16, averaged every 4": replace(
        BASE, strategy="loft", loft=replace(BASE.loft, exchange="alltoall", transport_dtype="bfloat16", average_every=4)
    ),
    "data-parallel": replace(BASE, strategy="data-parallel"),
    "gpipe": replace(BASE, strategy="gpipe"),
}
PING_PONG = """
import json, sys, time
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
def seconds(size, repetitions):
    data, times = np.zeros(size, dtype=np.uint8), []
    for _ in range(repetitions):
        world.Barrier()
        begun = time.perf_counter()
        if world.rank == 0:
            world.Send(data, 1); world.Recv(data, 1)
        elif world.rank == 1:
            world.Recv(data, 0); world.Send(data, 0)
        times.append((time.perf_counter() - begun) / 2)
    return sorted(times)[len(times) // 2]
small, large = seconds(8, 101), seconds(4_000_000, 5)
if world.rank == 0:
    print(json.dumps({"latency": small, "bandwidth": 4_000_000 / (large - small)}))
"""


@dataclass(frozen=True)
class Link:
    latency_seconds: float
    bandwidth_bytes_per_second: float


def link(hosts: Hosts) -> Link:
    """Half a round trip of 8 bytes, and bytes per second of 4 MB. Raises TrainingFailed."""
    result = hosts.launch(["python", "-c", PING_PONG], seconds=60, environment=ENVIRONMENT)
    if result.code:
        raise TrainingFailed(result.err[-2000:])
    found = json.loads(result.out.strip().splitlines()[-1])
    return Link(found["latency"], found["bandwidth"])


def epoch_seconds(hosts: Hosts, settings: PretrainSettings, algorithms: dict[str, str]) -> tuple[float, float]:
    """(training, exchange) seconds of the last epoch of a real run. Raises TrainingFailed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [
            "--strategy", settings.strategy, "--model", settings.model, "--widen", str(settings.widen), "--epochs", str(settings.epochs),
            "--batch-size", str(settings.batch_size), "--snapshot-every", "0", "--evaluate-every", "1000",
            "--statistics-batches", "2", "--run", str(run),
        ]  # fmt: skip
        if settings.strategy == "loft":
            loft = settings.loft
            options += ["--local-iterations", str(loft.local_iterations), "--exchange", loft.exchange]
            options += ["--transport-dtype", loft.transport_dtype, "--average-every", str(loft.average_every)]
        if settings.strategy == "gpipe":
            options += ["--split", settings.pipeline.split, "--micro-batches", str(settings.pipeline.micro_batches)]
        result = hosts.launch(["loft", "pretrain", *options], seconds=300, environment=ENVIRONMENT, mca=algorithms)
        check(result, run)
        epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line]
        last = [event for event in epochs if event["event"] == "epoch"][-1]
    return last["train_wall_seconds"], last["exchange_seconds"]


def flop_rate(hosts: Hosts, ranks: int) -> float:
    """FLOP/s that a rank sustains beside the others, from a data-parallel epoch without its all-reduces."""
    total, exchanging = epoch_seconds(hosts, CASES["data-parallel"], TEXTBOOK)
    shape = known_shape("digits")
    network = architecture(BASE.model, shape.num_classes, shape.channels, shape.stem, BASE.widen)
    images = shape.train_images // BASE.batch_size * BASE.batch_size / ranks
    flops = (1 + BACKWARD_PER_FORWARD) * images * network_size(network, None, shape.image_size).flops
    return flops / (total - exchanging)


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option(
    "--rate", "rates", type=float, multiple=True, default=(500.0, 100.0), show_default=True, help="Mbit/s of every link (repeat)."
)
@click.option("--own-algorithms", is_flag=True, help="Let Open MPI choose, in place of pinning the textbook algorithms.")
def main(ranks: int, rates: tuple[float, ...], own_algorithms: bool) -> None:
    algorithms = {} if own_algorithms else TEXTBOOK
    reason = available()
    if reason:
        raise click.ClickException(reason)
    try:
        with Hosts(ranks) as hosts:
            rate = flop_rate(hosts, ranks)
        click.echo(f"FLOP rate of a rank beside {ranks - 1} others: {rate:.3g} FLOP/s\n")
        click.echo(
            "| link | latency | bandwidth | strategy | predicted s/epoch | measured | predicted / measured |\n|---|---|---|---|---|---|---|"
        )
        for limit in (None, *rates):
            with Hosts(ranks, rate_mbit=limit) as hosts:
                of = link(hosts)
                cluster = Cluster("namespaces", of.latency_seconds, of.bandwidth_bytes_per_second, rate)
                for name, settings in CASES.items():
                    expected = predict(settings, ranks, cluster).seconds_per_epoch.total
                    measured, _ = epoch_seconds(hosts, settings, algorithms)
                    click.echo(
                        f"| {'unlimited' if limit is None else f'{limit:g} Mbit/s'} | {1e6 * of.latency_seconds:.0f} us "
                        f"| {of.bandwidth_bytes_per_second / 1e6:.1f} MB/s | {name} | {expected:.2f} | {measured:.2f} | {expected / measured:.2f} |"
                    )
    except TrainingFailed as problem:
        raise click.ClickException(str(problem)) from None


if __name__ == "__main__":
    main()
