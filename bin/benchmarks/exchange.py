"""One LoFT exchange against raw mpi4py collectives on the same bytes, taking turns in the same run.

Legend: `raw` is mpi4py's Allgatherv and Allreduce of as many bytes from and into buffers that are there already; `collectives` the
same through comm/ (Horovod, with the ledger); `exchange` all of what a round does to get the ranks to agree (remember the shared
parameters, take the difference, both collectives, add the mean); `redeal` fills the next sub-network out of the gathered buffer.
"""

import statistics
import time

import click
import numpy as np
import torch
from mpi4py import MPI

from loft_hpc.comm.world import start
from loft_hpc.filterwise.exchange import AllGatherExchange, full_layout
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.training.device import place


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="resnet34", show_default=True)
@click.option("--repetitions", type=click.IntRange(3), default=31, show_default=True)
def main(model: str, repetitions: int) -> None:
    world = start()
    device, _ = place("cpu", "float32", world)
    network = architecture(model, 10)
    groups = partitioned_groups(filter_groups(network), "paper")
    initial = {name: parameter.detach() for name, parameter in build(network, seed=0).named_parameters()}
    sub = SubNetwork(network, groups, world.rank, world.size, device, momentum_travels=False)
    exchange = AllGatherExchange(sub, full_layout(initial, groups, sub), groups, world)
    deals = [deal(groups, world.size, 0, number) for number in range(repetitions + 1)]
    sub.load(initial, deals[0][world.rank])

    mine = np.zeros(sub.partitioned.content.numel(), dtype=np.float32)
    shared = np.zeros(sub.shared.content.numel(), dtype=np.float32)
    counts = world.mpi.allgather(len(mine))
    gathered = np.zeros(sum(counts), dtype=np.float32)
    arriving = torch.zeros(sum(counts))

    def raw() -> None:
        world.mpi.Allgatherv(mine, [gathered, counts])
        world.mpi.Allreduce(MPI.IN_PLACE, shared)

    def collectives() -> None:
        gathering = world.all_gather(sub.partitioned.content, arriving, counts, "partitioned")
        summing = world.all_reduce_(zeros, "shared")
        gathering()
        summing()

    def whole_exchange() -> None:
        exchange.begin_round()
        exchange.run()

    zeros = torch.zeros_like(sub.shared.content)
    times: dict[str, list[float]] = {"raw": [], "collectives": [], "exchange": [], "redeal": []}

    def timed(name: str, action) -> None:
        world.barrier()
        begun = time.perf_counter()
        action()
        world.barrier()
        times[name].append(time.perf_counter() - begun)

    raw()
    for number in range(repetitions):
        timed("raw", raw)
        timed("collectives", collectives)
        timed("exchange", whole_exchange)
        timed("redeal", lambda number=number: exchange.redeal(deals[number], deals[number + 1]))
    merged = exchange.merge(deals[-2])
    if not all(torch.equal(merged[name], initial[name]) for name in initial):
        raise SystemExit("the exchange changed parameters that nobody trained: the timing means nothing")
    if world.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        click.echo(
            f"{model}, {world.size} ranks, {repetitions} repetitions; per rank {mine.nbytes:,} partitioned and {shared.nbytes:,} shared bytes"
        )
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            click.echo(
                f"{name:11} median {1e3 * medians[name]:8.2f} ms   quartiles {1e3 * low:.2f} to {1e3 * high:.2f}   {medians[name] / medians['raw']:.2f} x raw"
            )
        both = medians["exchange"] + medians["redeal"]
        click.echo(f"exchange and redeal together {1e3 * both:.2f} ms   {both / medians['raw']:.2f} x raw")


if __name__ == "__main__":
    main()
