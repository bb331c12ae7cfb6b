"""The exchanges as they suit a GPU: a handful of kernels in place of some for every tensor, and no waiting for the device.

What travels and what is learnt are bit by bit those of `loft_hpc.filterwise.exchange`, whose way of picking filters suits a CPU's caches.
Nothing here is peculiar to one device: tests run it on CPU tensors.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from loft_hpc.filterwise.addresses import Addresses, Piece
from loft_hpc.filterwise.exchange import EXCHANGES, AllGatherExchange, AllToAllExchange, Exchange
from loft_hpc.filterwise.partition import Deal, leaving
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.groups import Selection
from loft_hpc.training.buffers import Layout


class GpuAllGather(AllGatherExchange):
    """The next sub-network is one gather out of the gathered buffer."""

    on_gpu = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.addresses = _addresses(self._sub)

    def _fill(self, old: Deal, new: Deal) -> None:
        starts = [0, *accumulate(self._counts)]
        pieces = [Piece(start, layout, hand) for start, layout, hand in zip(starts, self._layouts, old, strict=False)]
        self.addresses.gather(self._sub.partitioned.content, new[self._world.rank], self._gathered, pieces)


class GpuAllToAll(AllToAllExchange):
    """What leaves and what stays is one scatter of the rank's own buffer, the next sub-network one gather out of what arrived and stayed.

    A rank holds as many filters after a round as before, so both are as long as its own buffer.
    """

    on_gpu = True

    def _allocate(self) -> None:
        own = self._sub.partitioned.content
        self._packed = torch.zeros_like(own)  # what leaves, worker by worker, then what stays
        self._home = torch.zeros_like(own)  # what arrived, then what stayed
        self._leaves = self._packed if self._exact else torch.zeros_like(own, dtype=self._transport)
        self._arrives = self._home if self._exact else torch.zeros_like(own, dtype=self._transport)
        self.addresses = _addresses(self._sub)

    def pack(self, old: Deal, new: Deal) -> None:
        leaves = leaving(old, new, self._world.rank, self._groups)
        layouts = self._layouts_of(leaves)
        self.sent_counts = self._sizes(layouts)
        pieces = self._stays_last(self.sent_counts, layouts, leaves)
        self.addresses.scatter(self._sub.partitioned.content, old[self._world.rank], self._packed, pieces)
        if not self._exact:
            sent = sum(self.sent_counts)
            self._leaves[:sent].copy_(self._packed[:sent])
        self._expect(old, new)

    def unpack(self, old: Deal, new: Deal) -> None:
        sent, received = sum(self.sent_counts), sum(self.received_counts)
        if not self._exact:
            self._home[:received].copy_(self._arrives[:received])
        self._home[received:].copy_(self._packed[sent:])
        pieces = self._stays_last(self.received_counts, self._arrival_layouts, self._arrivals)
        self.addresses.gather(self._sub.partitioned.content, new[self._world.rank], self._home, pieces)

    def _stays_last(self, sizes: list[int], layouts: Sequence[Layout], hands: Sequence[Selection]) -> list[Piece]:
        starts = [0, *accumulate(sizes)]
        starts[self._world.rank] = starts[-1]
        return [Piece(start, layout, hand) for start, layout, hand in zip(starts, layouts, hands, strict=False)]


GPU_EXCHANGES: dict[str, type[Exchange]] = {"allgather": GpuAllGather, "alltoall": GpuAllToAll}


def exchange_class(kind: str, on_gpu: bool) -> Callable[..., Exchange]:
    """The exchange of that name for buffers on a CPU or on a GPU."""
    return (GPU_EXCHANGES if on_gpu else EXCHANGES)[kind]


def _addresses(sub: SubNetwork) -> Addresses:
    buffer = sub.partitioned
    return Addresses(buffer.layout, sub.groups, 2 if sub.momentum_travels else 1, buffer.content.device)
