"""The exchanges for GPUs, on CPU tensors, against those for CPUs: bit by bit, what is sent and what is kept."""

import numpy as np
import pytest
import torch

from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups

from tiny import CPU, initial_state

SIZES = (3,)


def any_architecture(seed: int, workers: int) -> Architecture:
    """Some stages of some blocks, with widths that the workers cannot share evenly more often than not."""
    draw = np.random.default_rng(seed)
    stages = int(draw.integers(2, 4))
    blocks = tuple(int(count) for count in draw.integers(1, 4, stages))
    widths = tuple(int(width) for width in draw.integers(workers, 15, stages))
    return Architecture("any", blocks, widths, bool(draw.integers(2)), 1, "cifar", 1, 5)


@pytest.mark.parametrize("kind", ["allgather", "alltoall"])
@pytest.mark.parametrize("transport", ["float32", "bfloat16"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_bitwise_what_the_cpus_exchange_does(world, kind, transport, momentum, seed):
    architecture = any_architecture(seed, world.size)
    groups = partitioned_groups(filter_groups(architecture), "all-blocks")
    initial = initial_state(architecture, seed)
    pairs = []
    for on_gpu in (False, True):
        sub = SubNetwork(architecture, groups, world.rank, world.size, CPU, momentum)
        exchange = exchange_class(kind, on_gpu)(sub, full_layout(initial, sub), groups, world, TRANSPORT_DTYPES[transport])
        sub.load(initial, deal(groups, world.size, seed, 0)[world.rank])
        exchange.agree()
        pairs.append((sub, exchange))
    (one, usual), (other, device) = pairs
    draw = torch.Generator().manual_seed(world.rank)
    for number in range(3):
        old, new = (deal(groups, world.size, seed, number + later) for later in (0, 1))
        for buffer, same in ((one.partitioned, other.partitioned), (one.shared, other.shared)):
            buffer.content.add_(torch.randn(buffer.content.shape, generator=draw))
            same.content.copy_(buffer.content)
        for exchange in (usual, device):
            exchange.run(old, new)
        assert torch.equal(one.partitioned.content, other.partitioned.content)
        assert torch.equal(one.shared.content, other.shared.content)
        if kind == "alltoall":
            assert (usual.sent_counts, usual.received_counts) == (device.sent_counts, device.received_counts)
            sent, received = sum(usual.sent_counts), sum(usual.received_counts)
            assert torch.equal(usual._leaves[:sent], device._leaves[:sent])
            assert torch.equal(usual._arrives[:received], device._arrives[:received])
        for whose in (False, True) if momentum else (False,):
            merged = [exchange.merge(new, momentum=whose) for exchange in (usual, device)]
            assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
