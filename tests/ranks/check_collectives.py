"""The collectives against mpi4py's, and what they enter in the ledger."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

from loft_hpc.comm.ledger import Ledger, ring_allgather, ring_allreduce

SIZES = (1, 2, 3, 4)


def values(world, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(world.rank))


def test_sum_equals_mpi4pys(world):
    tensor = values(world, 1003)
    expected = MPI.COMM_WORLD.allreduce(tensor.double().numpy(), MPI.SUM)
    world.all_reduce_(tensor, "shared")()
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_allgather_with_uneven_counts_fills_the_given_buffer(world):
    counts = [rank + 1 for rank in range(world.size)]
    output = torch.full((sum(counts),), -1.0)
    address = output.data_ptr()
    for repetition in range(3):
        mine = values(world, counts[world.rank]) + repetition
        world.all_gather(mine, output, counts, "partitioned")()
        assert output.data_ptr() == address
        assert torch.equal(output, torch.from_numpy(np.concatenate(MPI.COMM_WORLD.allgather(mine.numpy()))))


def test_allgather_refuses_counts_that_do_not_fit(world):
    with pytest.raises(ValueError, match="does not fit"):
        world.all_gather(torch.zeros(3), torch.zeros(5), [3] * world.size, "partitioned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alltoall_equals_mpi4pys_and_counts_what_leaves(world, dtype):
    """Rank r sends r + s elements to rank s, none to itself."""
    sent = [(world.rank + other) * (other != world.rank) for other in range(world.size)]
    mine = values(world, sum(sent)).to(dtype)
    output = torch.zeros(sum(sent), dtype=dtype)  # symmetric: as much arrives
    address = output.data_ptr()
    world.ledger = Ledger()
    world.all_to_all(mine, output, sent, sent, "partitioned")()
    expected = torch.cat([torch.tensor(part) for part in MPI.COMM_WORLD.alltoall([part.tolist() for part in mine.float().split(sent)])])
    assert torch.equal(output.float(), expected) and output.data_ptr() == address
    entry = world.ledger.entry("alltoall", "partitioned")
    if world.size > 1:
        size = sum(sent) * dtype.itemsize
        assert entry.payload_sent_bytes == entry.payload_received_bytes == entry.wire_sent_bytes == entry.poster_bytes == size
    with pytest.raises(ValueError, match="does not fit"):
        world.all_to_all(mine, torch.zeros(sum(sent) + 1, dtype=dtype), sent, sent, "partitioned")


def test_broadcast_gives_everyone_roots_values(world):
    tensor = values(world, 10)
    world.broadcast_(tensor, "shared")()
    assert torch.equal(tensor, torch.randn(10, generator=torch.Generator().manual_seed(0)))


def test_ledger_of_the_collectives(world):
    world.ledger = Ledger()
    world.all_reduce_(torch.zeros(10), "shared")()
    world.all_gather(torch.zeros(2), torch.zeros(2 * world.size), [2] * world.size, "partitioned")()
    reduced, gathered = world.ledger.entry("allreduce", "shared"), world.ledger.entry("allgather", "partitioned")
    if world.size == 1:
        assert reduced.calls == gathered.calls == 0
        return
    assert (reduced.payload_sent_bytes, reduced.payload_received_bytes) == (40, 40)
    assert (gathered.payload_sent_bytes, gathered.payload_received_bytes) == (8, 8 * world.size)
    sent = MPI.COMM_WORLD.allreduce(reduced.wire_sent_bytes)
    assert sent == MPI.COMM_WORLD.allreduce(reduced.wire_received_bytes) == 2 * (world.size - 1) * 40
    assert gathered.wire_sent_bytes == gathered.wire_received_bytes == 8 * (world.size - 1)


def test_ring_costs_balance(world):
    for size in range(1, 9):
        for elements in (1, 7, 64):
            pairs = [ring_allreduce(elements, 4, rank, size) for rank in range(size)]
            assert sum(sent for sent, _ in pairs) == sum(received for _, received in pairs) == 8 * (size - 1) * elements
            # what a rank receives is what its predecessor sends
            assert [received for _, received in pairs] == [pairs[rank - 1][0] for rank in range(size)]
            counts = [elements + rank for rank in range(size)]
            pairs = [ring_allgather(counts, 4, rank) for rank in range(size)]
            assert [received for _, received in pairs] == [pairs[rank - 1][0] for rank in range(size)]
            assert sum(sent for sent, _ in pairs) == 4 * (size - 1) * sum(counts)


def test_objects_arrive_in_the_order_of_ranks(world):
    assert world.gather_objects(("rank", world.rank)) == [("rank", rank) for rank in range(world.size)]
