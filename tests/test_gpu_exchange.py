"""What the exchanges for GPUs ask of a device: buffers on torch's meta device, where every operation can be seen and nothing can be read."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loft_hpc.filterwise.exchange import TRANSPORT_DTYPES
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.training.buffers import Layout

META = torch.device("meta")
VIEWS = ("view", "slice", "select", "alias", "detach")
WORKERS = 4


@dataclass(frozen=True)
class Seat:
    rank: int
    size: int


class Operations(TorchDispatchMode):
    """Names of the operations that a device would run: those that take or give a tensor on it, but for views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        name = operation.overloadpacket.__name__
        if any(tensor.is_meta for tensor in tensors) and name not in VIEWS:
            self.names.append(name)
        return result


def operations(kind: str, transport: str, momentum: bool, groups_wanted: int) -> tuple[list[str], list[str], int, int]:
    """(of pack, of unpack, bytes of tables, own parameters) in a network with so many groups, all of 10 filters."""
    architecture = Architecture("any", (1, groups_wanted - 1), (10, 10), False, 1, "cifar", 1, 5)
    groups = partitioned_groups(filter_groups(architecture), "all-blocks")
    assert len(groups) == groups_wanted
    sub = SubNetwork(architecture, groups, 1, WORKERS, META, momentum)
    whole = SubNetwork(architecture, groups, 0, 1, META, False)
    full = Layout(whole.partitioned.layout.shapes)
    exchange = exchange_class(kind, True)(sub, full, groups, Seat(1, WORKERS), TRANSPORT_DTYPES[transport])
    old, new = (deal(groups, WORKERS, 0, number) for number in (0, 1))
    with Operations() as packing:
        exchange.pack(old, new)
    with Operations() as unpacking:
        exchange.unpack(old, new)
    return packing.names, unpacking.names, exchange.addresses.table_bytes, sub.partitioned.layout.numel


# the copy of the round's small table, two kernels for the addresses, and the gather (scatter: and a conversion of its indices)
GATHER = ["_to_copy", "index_select", "addcmul", "index_select"]
SCATTER = ["_to_copy", "index_select", "addcmul", "_to_copy", "index_copy_"]


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(
    ("kind", "transport", "pack", "unpack"),
    [
        ("allgather", "float32", [], GATHER),
        ("allgather", "bfloat16", ["copy_"], ["copy_", "copy_", *GATHER]),
        ("alltoall", "float32", SCATTER, ["copy_", *GATHER]),
        ("alltoall", "bfloat16", [*SCATTER, "copy_"], ["copy_", "copy_", *GATHER]),
    ],
)
def test_as_many_operations_for_2_groups_as_for_16(kind, transport, pack, unpack, momentum):
    """Among them none that waits for the device (nonzero, item); on the meta device such a one would fail besides."""
    for groups in (2, 16):
        packing, unpacking, tables, own = operations(kind, transport, momentum, groups)
        assert (packing, unpacking) == (pack, unpack)
        assert tables == 8 * own
