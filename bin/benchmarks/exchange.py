"""One LoFT exchange by each engine against raw mpi4py collectives on the same bytes, taking turns in the same run.

Legend: `raw` is mpi4py's collectives of as many bytes from and into buffers in host memory that are there already (Allgatherv or
Alltoallv of the partitioned parameters; Allreduce of the shared ones, or Alltoallv and Allgatherv of them in 16 bits); `collectives` the
same through an engine and the ledger; `exchange` all of what a round does to get the ranks to agree (the change of the shared parameters,
the collectives, adding the mean); `pack` and `unpack` lay out what leaves and fill the next sub-network.
"""

import statistics
import time
from itertools import pairwise

import click
import numpy as np
import torch
from mpi4py import MPI

from loft_hpc.comm.engines import ENGINES, open_engine
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
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
    """The exchange's own collectives, through an engine and the ledger, without the arithmetic on what they carry."""

    def __init__(self, world, exchange, shared: int, dtype: torch.dtype, device: torch.device):
        self._world, self._exchange, self._shared = world, exchange, torch.zeros(shared, dtype=dtype, device=device)
        self._chunks = shares(shared, world.size)
        self._mine = torch.zeros(self._chunks[world.rank], dtype=dtype, device=device)
        self._of_all = torch.zeros(world.size * len(self._mine), dtype=dtype, device=device)

    def run(self, average: bool) -> None:
        exact = self._shared.dtype == torch.float32
        summing = None
        if average and exact:
            summing = self._world.all_reduce_(self._shared, "shared")
        elif average:
            summing = self._world.all_to_all(self._shared, self._of_all, self._chunks, [len(self._mine)] * self._world.size, "shared")
        moving = self._exchange.send_partitioned()
        if summing:
            summing()
        if average and not exact:
            self._world.all_gather(self._mine, self._shared, self._chunks, "shared")()
        moving()


class Contestant:
    """The exchange by one engine, after one that showed it right."""

    def __init__(self, engine: str, device: str, network, groups, kind: str, gpu_kernels: bool, dtype: torch.dtype, deals):
        self.world = World(MPI.COMM_WORLD, open_engine(engine, MPI.COMM_WORLD))
        self.device, _ = place(device, "float32", self.world)
        self._deals, self._dtype = deals, dtype
        self._initial = {name: parameter.detach().to(self.device) for name, parameter in build(network, seed=0).named_parameters()}
        self.sub = SubNetwork(network, groups, self.world.rank, self.world.size, self.device, momentum_travels=False)
        kernels = exchange_class(kind, gpu_kernels or self.device.type == "cuda")
        self.exchange = kernels(self.sub, full_layout(self._initial, self.sub), groups, self.world, dtype)
        self.sub.load(self._rounded(), deals[0][self.world.rank])
        self.exchange.agree()
        self.exchange.run(deals[0], deals[1])
        self.idle = Idle(self.world, self.exchange, self.sub.shared.content.numel(), dtype, self.device)

    def _rounded(self) -> dict[str, torch.Tensor]:
        partitioned = self.sub.partitioned.views
        return {name: tensor.to(self._dtype).float() if name in partitioned else tensor for name, tensor in self._initial.items()}

    def left_alone(self) -> bool:
        """Whether no parameter changed, as nobody trained."""
        merged, expected = self.exchange.merge(self._deals[-1]), self._rounded()
        return all(torch.equal(merged[name], expected[name]) for name in expected)


@click.command(help=__doc__)
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, default=("horovod", "mpi4py"), show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="resnet34", show_default=True)
@click.option("--widen", type=float, help="[default: the model's own]")
@click.option("--exchange", "kind", type=click.Choice(list(EXCHANGES)), default="allgather", show_default=True)
@click.option("--partition", "rule", type=click.Choice(PARTITION_RULES), default="paper", show_default=True)
@click.option("--transport-dtype", "transport", type=click.Choice(list(TRANSPORT_DTYPES)), default="float32", show_default=True)
@click.option("--average-every", type=click.IntRange(1), default=1, show_default=True, help="Times are then means over so many rounds.")
@click.option("--gpu-kernels", is_flag=True, help="Pick filters as on a GPU (on a CPU: says nothing about a GPU's time).")
@click.option("--repetitions", type=click.IntRange(3), default=31, show_default=True)
def main(
    engines: tuple[str, ...], device: str, model: str, widen: float | None, kind: str, rule: str, transport: str, average_every: int,
    gpu_kernels: bool, repetitions: int,
) -> None:  # fmt: skip
    network = architecture(model, 10, widen=widen)
    groups, dtype = partitioned_groups(filter_groups(network), rule), TRANSPORT_DTYPES[transport]
    size = MPI.COMM_WORLD.Get_size()
    deals = [deal(groups, size, 0, number) for number in range(repetitions * average_every + 2)]
    try:
        entries = {engine: Contestant(engine, device, network, groups, kind, gpu_kernels, dtype, deals) for engine in engines}
    except LoftError as problem:
        raise SystemExit(f"bin/bench: {problem}") from None
    first = next(iter(entries.values()))
    world, counts = first.world, (first.sub.partitioned.content.numel(), first.sub.shared.content.numel())
    raw = Raw(world, first.exchange, *counts, 8 * dtype.itemsize)
    raw.run(True)
    times: dict[str, list[float]] = {}

    def timed(name: str, action) -> None:
        world.barrier()
        begun = time.perf_counter()
        action()
        if first.device.type == "cuda":
            torch.cuda.synchronize()
        world.barrier()
        times.setdefault(name, []).append(time.perf_counter() - begun)

    for number, (old, new) in enumerate(pairwise(deals[1:]), start=1):
        average = number % average_every == 0
        timed("raw", lambda average=average: raw.run(average))
        for engine, one in entries.items():
            timed(f"{engine} pack", lambda one=one, old=old, new=new: one.exchange.pack(old, new))
            timed(f"{engine} collectives", lambda one=one, average=average: one.idle.run(average))
            timed(f"{engine} exchange", lambda one=one, average=average: one.exchange.communicate(average))
            timed(f"{engine} unpack", lambda one=one, old=old, new=new: one.exchange.unpack(old, new))
    # one repetition is as many rounds as it takes to average once
    times = {
        name: [statistics.mean(rounds) for rounds in zip(*[iter(values)] * average_every, strict=True)] for name, values in times.items()
    }
    if not all(one.left_alone() for one in entries.values()):
        raise SystemExit("the exchange changed parameters that nobody trained: the timing means nothing")
    if world.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        held = " and ".join(f"{count * dtype.itemsize:,} {what}" for count, what in zip(counts, ("partitioned", "shared"), strict=True))
        click.echo(
            f"{model}, {kind}, {rule}, {transport}, averaged every {average_every}, {size} ranks on {first.device.type}, "
            f"{repetitions} repetitions; a rank holds {held} bytes"
        )
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            click.echo(
                f"{name:20} median {1e3 * medians[name]:8.2f} ms   quartiles {1e3 * low:.2f} to {1e3 * high:.2f}   "
                f"{medians[name] / medians['raw']:.2f} x raw"
            )


if __name__ == "__main__":
    main()
