"""The engines against one another and against numpy: the same bits, and the same ledger. mpi4py is Horovod's oracle."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from mpi4py import MPI

from loft_hpc.comm.engines import open_engine
from loft_hpc.comm.world import World
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.settings import Computation, Optimisation

from tiny import CPU, initial_state, make_gpipe, make_loft, tiny

SIZES = (2, 3, 4)
ENGINES = [name for name in ("horovod", "mpi4py") if find_spec(name)]


@pytest.fixture(scope="module")
def worlds(world) -> list[World]:
    """A world for each engine, over the same ranks."""
    made = [World(MPI.COMM_WORLD, open_engine(name, MPI.COMM_WORLD)) for name in ENGINES]
    for one in made:
        one.use_device(CPU, alone=False)
    return made


def make_data_parallel(world) -> DataParallel:
    data = digits(CPU)
    order = Order("split", data.info.train_images, 10, 5, world.rank, world.size)
    return DataParallel(tiny(), None, initial_state(tiny()), Optimisation(lr=0.1), data, order, 12, Computation(), CPU, world)


TRAININGS = {
    "all-gather": make_loft,
    "all-to-all of bfloat16": lambda world: make_loft(world, exchange="alltoall", transport_dtype="bfloat16"),
    "all-to-all with momentum": lambda world: make_loft(world, exchange="alltoall", momentum_across_rounds="carry", average_every=2),
    "data-parallel": make_data_parallel,
    "gpipe": make_gpipe,
}


@pytest.mark.parametrize("make", TRAININGS.values(), ids=TRAININGS.keys())
def test_trainings_have_the_same_bits_and_bytes(worlds, make):
    ended, ledgers = [], []
    for world in worlds:
        world.ledger.entries.clear()
        strategy = make(world)
        while strategy.advance().step < strategy.total_steps:
            pass
        ended.append(strategy.full_state())
        ledgers.append(world.ledger.to_json())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0]) and ended[0].keys() == ended[1].keys()
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("engine", range(len(ENGINES)), ids=ENGINES)
def test_collectives_do_what_they_say(worlds, engine, dtype):
    """Against the same done by numpy with what all ranks hold; uneven counts, none among them."""
    world = worlds[engine]
    counts = [3 * rank for rank in range(world.size)]
    parts = [torch.arange(count).to(dtype) + 10 * rank for rank, count in enumerate(counts)]
    output = torch.empty(sum(counts), dtype=dtype)
    assert torch.equal(world.all_gather(parts[world.rank], output, counts, "control")(), torch.cat(parts))
    sent = [[(one + 2 * other) % 4 * (one != other) for other in range(world.size)] for one in range(world.size)]
    held = [torch.arange(sum(row)).to(dtype) + 100 * rank for rank, row in enumerate(sent)]
    expected = torch.cat([held[one].split(sent[one])[world.rank] for one in range(world.size)])
    received = [row[world.rank] for row in sent]
    output = torch.empty(sum(received), dtype=dtype)
    assert torch.equal(world.all_to_all(held[world.rank], output, sent[world.rank], received, "control")(), expected)
    if dtype == torch.bfloat16:  # neither reduces it
        return
    for root in range(world.size):
        assert torch.equal(
            world.broadcast_(parts[world.rank].clone() if world.rank == root else torch.empty_like(parts[root]), "control", root)(),
            parts[root],
        )
    mine = torch.arange(5).to(dtype) * (world.rank + 1)
    assert np.array_equal(world.all_reduce_(mine, "control")(), np.arange(5) * sum(range(1, world.size + 1)))
