"""One LoFT exchange against raw mpi4py collectives on the same bytes, taking turns in the same run.

Legend: `raw` is mpi4py's collectives of as many bytes from and into buffers that are there already (Allgatherv or Alltoallv of the
partitioned parameters; Allreduce of the shared ones, or Alltoallv and Allgatherv of them in 16 bits); `collectives` the same through Horovod and the
ledger; `exchange` all of what a round
does to get the ranks to agree (the change of the shared parameters, the collectives, adding the mean); `pack` and
`unpack` lay out what leaves and fill the next sub-network.
"""

import statistics
import time
from itertools import pairwise

import click
import numpy as np
import torch
from mpi4py import MPI

from loft_hpc.comm.start import start
from loft_hpc.filterwise.exchange import EXCHANGES, TRANSPORT_DTYPES, AllToAllExchange, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.groups import PARTITION_RULES, filter_groups, partitioned_groups, shares
from loft_hpc.models.resnet import build
from loft_hpc.training.device import place


class Raw:
    """The same bytes by mpi4py alone."""

    def __init__(self, world, exchange, own: int, shared: int, bits: int):
        self._mpi, self._exchange, self._size = world.mpi, exchange, world.size
        self._kind = np.float32 if bits == 32 else np.int16
        self._own, self._shared = (np.zeros(count, dtype=self._kind) for count in (own, shared))
        self._counts = world.mpi.allgather(own)
        self._gathered = np.zeros(sum(self._counts), dtype=self._kind)
        self._chunks = shares(shared, world.size)
        self._mine = np.zeros(self._chunks[world.rank], dtype=self._kind)
        self._of_all = np.zeros(world.size * len(self._mine), dtype=self._kind)
        self._datatype = MPI.FLOAT if bits == 32 else MPI.INT16_T

    def run(self, average: bool) -> None:
        if isinstance(self._exchange, AllToAllExchange):
            sent, received = self._exchange.sent_counts, self._exchange.received_counts
            self._mpi.Alltoallv([self._own, sent, self._datatype], [self._gathered[: sum(received)], received, self._datatype])
        else:
            self._mpi.Allgatherv(self._own, [self._gathered, self._counts, self._datatype])
        if not average:
            return
        if self._kind == np.float32:
            self._mpi.Allreduce(MPI.IN_PLACE, self._shared)
        else:
            same = [len(self._mine)] * self._size
            self._mpi.Alltoallv([self._shared, self._chunks, self._datatype], [self._of_all, same, self._datatype])
            self._mpi.Allgatherv(self._mine, [self._shared, self._chunks, self._datatype])


class Idle:
    """The exchange's own collectives, through Horovod and the ledger, without the arithmetic on what they carry."""

    def __init__(self, world, shared: int, dtype: torch.dtype):
        self._world, self._shared = world, torch.zeros(shared, dtype=dtype)
        self._chunks = shares(shared, world.size)
        self._mine = torch.zeros(self._chunks[world.rank], dtype=dtype)
        self._of_all = torch.zeros(world.size * len(self._mine), dtype=dtype)

    def run(self, exchange, average: bool) -> None:
        exact = self._shared.dtype == torch.float32
        summing = None
        if average and exact:
            summing = self._world.all_reduce_(self._shared, "shared")
        elif average:
            summing = self._world.all_to_all(self._shared, self._of_all, self._chunks, [len(self._mine)] * self._world.size, "shared")
        moving = exchange.send_partitioned()
        if summing:
            summing()
        if average and not exact:
            self._world.all_gather(self._mine, self._shared, self._chunks, "shared")()
        moving()


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="resnet34", show_default=True)
@click.option("--widen", type=float, help="[default: the model's own]")
@click.option("--exchange", "kind", type=click.Choice(list(EXCHANGES)), default="allgather", show_default=True)
@click.option("--partition", "rule", type=click.Choice(PARTITION_RULES), default="paper", show_default=True)
@click.option("--transport-dtype", "transport", type=click.Choice(list(TRANSPORT_DTYPES)), default="float32", show_default=True)
@click.option("--average-every", type=click.IntRange(1), default=1, show_default=True, help="Times are then means over so many rounds.")
@click.option("--gpu-kernels", is_flag=True, help="Pick filters as on a GPU (here on a CPU: says nothing about a GPU's time).")
@click.option("--repetitions", type=click.IntRange(3), default=31, show_default=True)
def main(
    model: str, widen: float | None, kind: str, rule: str, transport: str, average_every: int, gpu_kernels: bool, repetitions: int
) -> None:
    world = start()
    device, _ = place("cpu", "float32", world)
    network = architecture(model, 10, widen=widen)
    groups = partitioned_groups(filter_groups(network), rule)
    initial = {name: parameter.detach() for name, parameter in build(network, seed=0).named_parameters()}
    sub = SubNetwork(network, groups, world.rank, world.size, device, momentum_travels=False)
    dtype = TRANSPORT_DTYPES[transport]
    exchange = exchange_class(kind, gpu_kernels)(sub, full_layout(initial, sub), groups, world, dtype)
    deals = [deal(groups, world.size, 0, number) for number in range(repetitions * average_every + 2)]
    rounded = {name: tensor.to(dtype).float() if name in sub.partitioned.views else tensor for name, tensor in initial.items()}
    sub.load(rounded, deals[0][world.rank])
    exchange.agree()
    exchange.run(deals[0], deals[1])
    raw = Raw(world, exchange, sub.partitioned.content.numel(), sub.shared.content.numel(), 8 * dtype.itemsize)
    raw.run(True)
    times: dict[str, list[float]] = {name: [] for name in ("raw", "collectives", "exchange", "pack", "unpack")}
    idle = Idle(world, sub.shared.content.numel(), dtype)

    def timed(name: str, action) -> None:
        world.barrier()
        begun = time.perf_counter()
        action()
        world.barrier()
        times[name].append(time.perf_counter() - begun)

    for number, (old, new) in enumerate(pairwise(deals[1:]), start=1):
        timed("pack", lambda old=old, new=new: exchange.pack(old, new))
        average = number % average_every == 0
        timed("raw", lambda average=average: raw.run(average))
        timed("collectives", lambda average=average: idle.run(exchange, average))
        timed("exchange", lambda average=average: exchange.communicate(average))
        timed("unpack", lambda old=old, new=new: exchange.unpack(old, new))
    # one repetition is as many rounds as it takes to average once
    times = {
        name: [statistics.mean(rounds) for rounds in zip(*[iter(values)] * average_every, strict=True)] for name, values in times.items()
    }
    merged = exchange.merge(deals[-1])
    if not all(torch.equal(merged[name], rounded[name]) for name in initial):
        raise SystemExit("the exchange changed parameters that nobody trained: the timing means nothing")
    if world.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        bytes_each = sub.partitioned.content.numel() * dtype.itemsize, sub.shared.content.numel() * dtype.itemsize
        click.echo(
            f"{model}, {kind}, {rule}, {transport}, averaged every {average_every}, {world.size} ranks, {repetitions} repetitions; a rank holds {bytes_each[0]:,} partitioned and "
            f"{bytes_each[1]:,} shared bytes"
        )
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            click.echo(
                f"{name:11} median {1e3 * medians[name]:8.2f} ms   quartiles {1e3 * low:.2f} to {1e3 * high:.2f}   {medians[name] / medians['raw']:.2f} x raw"
            )


if __name__ == "__main__":
    main()
