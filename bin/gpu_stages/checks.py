"""What only a GPU can show, in one process for each rank: mpirun -np 2 python checks.py. A line for each check, JSON at the end.

A check that fails stops no other: all ranks tell one another how it went before the next begins. (Processes that read images import the
main file anew, so nothing happens here but under `__main__`.)
"""

import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from loft_hpc.comm.engines import open_engine
from loft_hpc.comm.start import start
from loft_hpc.comm.world import World
from loft_hpc.data import embedded
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.loft import Loft, LoftSettings
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.tickets.block_scores import BLOCK_CRITERIA, BlockScoring
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import judge, network_for, reestimate_statistics
from loft_hpc.training.settings import Computation, Evaluation, Optimisation
from loft_hpc.training.strategy import Strategy

CPU = torch.device("cpu")
textures = cache(embedded.textures)


class Checks:
    """Runs them, in step with the other ranks."""

    def __init__(self, world: World, device: torch.device, widen: float):
        self.world, self.device = world, device
        self.network = architecture("preresnet20", 18, 1, "cifar", widen)
        self.on_gpu = device.type == "cuda"
        self.results: dict[str, dict] = {}

    def run(self, name: str, check: Callable[[], Any]) -> None:
        self.world.barrier()
        began, problem, said = time.perf_counter(), None, None
        try:
            said = check()
        except Exception as error:
            frames = reversed(traceback.extract_tb(error.__traceback__)[-4:])
            problem = f"{type(error).__name__}: {str(error)[:200]} at " + " < ".join(
                f"{Path(one.filename).name}:{one.lineno}" for one in frames
            )
            traceback.print_exc()
        everybody = self.world.gather_objects((problem, said))  # one left inside a collective hangs here: the caller's limit ends it
        bad = {rank: text for rank, (text, _) in enumerate(everybody) if text}
        seconds = round(time.perf_counter() - began, 2)
        self.results[name] = {"ok": not bad, "said": everybody[0][1], "problems": bad, "seconds": seconds}
        if self.world.rank == 0:
            print(f"{'FAIL' if bad else 'ok  '} {name:58} {seconds:6.1f} s  {bad or everybody[0][1]}", flush=True)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in build(self.network, seed=0).named_parameters()}

    # -- collectives ------------------------------------------------------------------------------------------------------

    def collectives(self, world: World) -> str:
        rank, size = world.rank, world.size
        for dtype in (torch.float32, torch.float64):
            mine = (torch.arange(1000, dtype=dtype) * (rank + 1)).to(self.device)
            assert torch.equal(world.all_reduce_(mine, "control")().cpu(), torch.arange(1000, dtype=dtype) * sum(range(1, size + 1)))
        counts = [5 + 3 * other for other in range(size)]
        for dtype in (torch.float32, torch.bfloat16):

            def filled(count: int, value: float, where=self.device, dtype=dtype) -> torch.Tensor:
                return torch.full((count,), float(value), device=where, dtype=dtype)

            output = filled(sum(counts), -1)
            world.all_gather(filled(counts[rank], rank), output, counts, "merge")()
            assert torch.equal(output.cpu(), torch.cat([filled(count, other, CPU) for other, count in enumerate(counts)]))
            sent = [(4 + other) * (other != rank) for other in range(size)]
            received = [(4 + rank) * (other != rank) for other in range(size)]
            output = filled(sum(received), -1)
            world.all_to_all(filled(sum(sent), rank), output, sent, received, "partitioned")()
            if size > 1:
                assert torch.equal(output.cpu(), torch.cat([filled(count, other, CPU) for other, count in enumerate(received)]))
        last = world.broadcast_(torch.full((7,), float(rank), device=self.device), "control", root=size - 1)()
        assert float(last.sum()) == 7 * (size - 1)
        return f"engine {world.engine}"

    def engine(self, name: str) -> str:
        """Another engine over the same ranks does the same."""
        comm = getattr(self.world, "mpi", None)
        if comm is None:
            return "needs ranks"
        try:
            other = World(comm, open_engine(name, comm))
            place(self.device.type, "float32", other)
        except LoftError as problem:
            return f"not here: {problem}"
        return self.collectives(other)

    def engine_alone(self, name: str) -> str:
        """An engine's own GPU collectives in a world of one: all of NCCL that a machine with a single GPU can show."""
        from mpi4py import MPI

        if self.world.size > 1 or not self.on_gpu:
            return "for one rank with a GPU"
        try:
            engine = open_engine(name, MPI.COMM_WORLD).on(self.device, True)
        except LoftError as problem:
            return f"not here: {problem}"
        if not engine.takes(self.device, True):
            return "built without NCCL"
        for dtype in (torch.float32, torch.bfloat16):
            mine = torch.randn(1 << 20, device=self.device).to(dtype)
            for number, carry in enumerate((engine.all_gather, engine.all_to_all)):
                output, counts = torch.empty_like(mine), [[len(mine)]] * (1 + number)
                carry(mine, output, *counts, f"{name}.{number}.{dtype}")()
                assert torch.equal(output, mine), (carry, dtype)
        mine = torch.randn(1 << 20, device=self.device)
        for number, carry in enumerate((engine.all_reduce_, partial(engine.broadcast_, root=0))):
            output = mine.clone()
            carry(output, name=f"{name}.in.{number}")()
            assert torch.equal(output, mine), carry
        return "all-gather, all-to-all (float32, bfloat16), all-reduce, broadcast"

    # -- the exchange -----------------------------------------------------------------------------------------------------

    def exchange(self, kind: str, transport: str, momentum: bool) -> str:
        """By the device's kernels, bit by bit what the CPU's do."""
        world = self.world
        if world.size == 1:
            return "needs ranks"
        groups, initial, pairs = partitioned_groups(filter_groups(self.network), "all-blocks"), self.state(), []
        for where, on_gpu in ((CPU, False), (self.device, True)):
            sub = SubNetwork(self.network, groups, world.rank, world.size, where, momentum)
            exchange = exchange_class(kind, on_gpu)(sub, full_layout(initial, sub), groups, world, TRANSPORT_DTYPES[transport])
            sub.load(initial, deal(groups, world.size, 0, 0)[world.rank])
            exchange.agree()
            pairs.append((sub, exchange))
        (one, usual), (other, on_device) = pairs
        draw, worst = torch.Generator().manual_seed(world.rank), 0.0
        for number in range(3):
            old, new = (deal(groups, world.size, 0, number + later) for later in (0, 1))
            for here, there in ((one.partitioned, other.partitioned), (one.shared, other.shared)):
                here.content.add_(torch.randn(here.content.shape, generator=draw))
                there.content.copy_(here.content)
            for exchange in (usual, on_device):
                exchange.run(old, new)
            assert torch.equal(one.partitioned.content, other.partitioned.content.cpu()), "the partitioned parameters differ"
            merged = [exchange.merge(new) for exchange in (usual, on_device)]
            differences = [(merged[0][name] - merged[1][name].cpu()).abs().max() for name in merged[0]]
            worst = max(worst, float((one.shared.content - other.shared.content.cpu()).abs().max()), *map(float, differences))
        assert worst < 1e-5, worst
        return f"shared parameters differ by at most {worst:.1e}"

    # -- training ---------------------------------------------------------------------------------------------------------

    def strategy(
        self,
        kind: str,
        where: torch.device,
        precision: str = "float32",
        exchange: str = "allgather",
        total: int = 60,
        compiled: bool = False,
    ) -> Strategy:
        data, world, computation = textures(where), self.world, Computation(precision=precision, compile=compiled)
        images = data.info.train_images
        if kind == "loft":
            order, settings = (
                Order("replicated", images, 64, 5, world.rank, world.size),
                LoftSettings(local_iterations=3, exchange=exchange),
            )
            return Loft(self.network, self.state(), settings, Optimisation(lr=0.05), data, order, total, 5, computation, where, world)
        order = Order("split", images, 64, 5, world.rank, world.size)
        return DataParallel(self.network, None, self.state(), Optimisation(lr=0.05), data, order, total, computation, where, world)

    def losses(self, strategy: Strategy, rounds: int = 4) -> list[float]:
        return [strategy.advance().mean_loss for _ in range(rounds)]

    def precisions(self, kind: str) -> str:
        """float32 is the CPU's to its rounding, the others further from it."""
        rounds, found = 3 if kind == "loft" else 1, {}
        reference = self.losses(self.strategy(kind, CPU), rounds)
        for precision, allowed in (("float32", 2e-3), ("tf32", 5e-2), ("bfloat16", 2e-1)):
            if precision == "float32" or self.on_gpu:
                place(self.device.type, precision, self.world)
                theirs = self.losses(self.strategy(kind, self.device, precision), rounds)
                found[precision] = max(abs(here - there) / abs(here) for here, there in zip(reference, theirs, strict=True))
                assert found[precision] < allowed, found
        place(self.device.type, "float32", self.world)
        return "relative: " + ", ".join(f"{precision} {worst:.1e}" for precision, worst in found.items())

    def compiled(self, kind: str) -> str:
        """torch.compile (with CUDA graphs on a GPU) changes rounding alone, in rounds after the first too, and repeats itself."""
        plain, one, two = (
            self.losses(self.strategy(kind, self.device, compiled=way), 3 if kind == "loft" else 1) for way in (False, True, True)
        )
        worst = max(abs(here - there) / abs(here) for here, there in zip(plain, one, strict=True))
        assert worst < 2e-3, (plain, one)
        return f"relative: {worst:.1e}; the same losses twice: {one == two}"

    def repeats(self, kind: str) -> str:
        """Twice the same, and resumed."""
        one, two = self.strategy(kind, self.device), self.strategy(kind, self.device)
        same = self.losses(one, 2) == self.losses(two, 2)
        step = one.advance().step
        two.advance()
        tensors, progress = two.checkpoint()
        other = self.strategy(kind, self.device)
        other.restore(Checkpoint(step, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, [], progress))
        more, again = self.losses(one, 1), self.losses(other, 1)
        states = [strategy.full_state() for strategy in (one, other)]
        bits = all(torch.equal(states[0][name].cpu(), states[1][name].cpu()) for name in states[0])
        assert abs(more[0] - again[0]) < 0.05 * abs(more[0]), (more, again)
        return f"the same bits twice: {same}, resumed: {bits}"

    def same_learning(self) -> str:
        one, two = self.strategy("loft", self.device), self.strategy("loft", self.device, exchange="alltoall")
        losses, states = [self.losses(one), self.losses(two)], [one.full_state(), two.full_state()]
        worst = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
        assert worst < 1e-2, worst
        return f"losses equal: {losses[0] == losses[1]}, largest difference {worst:.1e}"

    # -- waiting for the device -------------------------------------------------------------------------------------------

    def waits(self, action: Callable[[], Any]) -> Counter:
        """Where the host waits for the device meanwhile, by line."""
        if not self.on_gpu:
            action()
            return Counter()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                action()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in seen)

    def waits_of_steps(self) -> str:
        """A step waits for nothing; a round, once for its losses and for its exchange."""
        strategy, rounds = self.strategy("loft", self.device), 4
        strategy.advance()
        found = self.waits(lambda: self.losses(strategy, rounds))
        counts = dict(found.most_common(12))
        assert all(count <= 4 * rounds for count in counts.values()), counts
        return f"in {rounds} rounds of 3 steps: {counts}"

    def waits_of_evaluation(self) -> str:
        data, network = textures(self.device), network_for(self.network, None, self.state(), self.device, "")
        judge(network, data, Evaluation(), self.world)
        found = self.waits(lambda: judge(network, data, Evaluation(), self.world))
        assert sum(found.values()) <= 8, found
        return f"{dict(found)}"

    def evaluation(self) -> str:
        scores, seconds = [], 0.0
        for where in (CPU, self.device):
            network = network_for(self.network, None, self.state(), where, "")
            began = time.perf_counter()
            scores.append(judge(network, textures(where), Evaluation(), self.world))
            seconds = time.perf_counter() - began
        assert abs(scores[0].loss - scores[1].loss) < 5e-2 * abs(scores[0].loss), scores
        return f"{scores[0].correct} and {scores[1].correct} right, {seconds:.2f} s"

    def images(self) -> str:
        """Images from files are the CPU's, and passes over them take no more and more memory."""
        world = self.world
        folder: Path = world.on_root(lambda: Path(tempfile.mkdtemp()))
        if world.rank == 0:
            draw = np.random.default_rng(0)
            for split in ("train", "val"):
                for number in range(64):
                    place_of = folder / split / "ab"[number % 2]
                    place_of.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(draw.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(place_of / f"{number}.png")
        world.barrier()
        settings = DataSettings("imagefolder", str(folder), image_size=64, loader_workers=2)
        sets = [open_data(settings, where, world) for where in (CPU, self.device)]
        order = Order("replicated", 64, 16, 0, world.rank, world.size)
        for (here, label), (there, same) in zip(*(data.train_batches(order, 0, 8) for data in sets), strict=True):
            torch.randn(1500, 1500, device=self.device) @ torch.randn(1500, 1500, device=self.device)  # keeps the computing stream behind
            assert torch.equal(label, same.cpu()) and float((here - there.cpu()).abs().max()) < 1e-5
        growth = []
        for _ in range(12 if self.on_gpu else 2):
            before = torch.cuda.memory_reserved(self.device) if self.on_gpu else 0
            for _ in sets[1].test_batches(32, 0, 1):
                pass
            growth.append((torch.cuda.memory_reserved(self.device) if self.on_gpu else 0) - before)
        assert sum(growth[4:]) == 0, growth
        return f"memory reserved grows by {growth[0] >> 20} MiB in the first pass, by {sum(growth[1:]) >> 20} in the {len(growth) - 1} after it"

    def block_scores(self, criterion: str) -> str:
        found = []
        for where in (CPU, self.device):
            data, network = textures(where), network_for(self.network, None, self.state(), where, "")
            reestimate_statistics(network, data, Evaluation(statistics_batches=2), self.world)
            found.append(BLOCK_CRITERIA[criterion](network, data, BlockScoring(2, 32), self.world))
        here, there = found
        same = sorted(here, key=here.get) == sorted(there, key=there.get)
        worst = max(abs(here[block] - there[block]) / max(abs(here[block]), 1e-9) for block in here)
        return f"the same ranking: {same}, values differ by {worst:.1e}"


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--widen", type=float, default=2, show_default=True)
def main(device: str, widen: float) -> None:
    world = start()
    where, placement = place(device, "float32", world)
    checks = Checks(world, where, widen)
    run = checks.run
    name = torch.cuda.get_device_name(where) if checks.on_gpu else "CPU"
    run("placement", lambda: f"{name}, {placement}, engine {world.engine}")
    run("collectives", lambda: checks.collectives(world))
    for engine in ("horovod", "mpi4py", "nccl"):
        run(f"collectives by {engine}", partial(checks.engine, engine))
    for engine in ("horovod", "nccl"):
        run(f"{engine} on the GPU in a world of one", partial(checks.engine_alone, engine))
    for kind in ("allgather", "alltoall"):
        for transport in TRANSPORT_DTYPES:
            for momentum in (False, True):
                what = f"exchange {kind}, {transport}{', momentum' * momentum}: the CPU's bits"
                run(what, partial(checks.exchange, kind, transport, momentum))
    for kind in ("loft", "data-parallel"):
        run(f"{kind}: losses by precision", partial(checks.precisions, kind))
        if checks.on_gpu:  # a CPU compiles for a minute: tests/test_device.py
            run(f"{kind}: compiled", partial(checks.compiled, kind))
        run(f"{kind}: repeated and resumed", partial(checks.repeats, kind))
    run("loft: allgather and alltoall learn alike", checks.same_learning)
    run("no step waits for the device", checks.waits_of_steps)
    run("evaluation: the CPU's score", checks.evaluation)
    run("evaluation hardly waits for the device", checks.waits_of_evaluation)
    run("images from files", checks.images)
    for criterion in ("snip", "grasp", "l1", "hrank", "expect-abs", "kl", "pls"):
        run(f"block criterion {criterion}: the CPU's ranking", partial(checks.block_scores, criterion))
    if world.rank == 0:
        good = sum(result["ok"] for result in checks.results.values())
        print(f"{good} of {len(checks.results)} checks passed on {world.size} ranks, {where}", flush=True)
        file = Path(os.environ.get("OUT", ".")) / f"checks-{world.size}.json"
        file.write_text(json.dumps(checks.results, indent=1, default=str))
        if good < len(checks.results):
            world.barrier()
            raise SystemExit(1)
    world.barrier()


if __name__ == "__main__":
    main()
