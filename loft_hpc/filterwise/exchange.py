"""What the workers tell one another after each round: shared parameters averaged, every partitioned filter to who trains it next.

Legend: S workers, P partitioned and C shared parameters of the full network; worker s holds P_s of P. A filter that changes hands, and
the averaged change of the shared parameters, travel in the transport's type; a filter that stays keeps its float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.filterwise.averaging import Averaging
from loft_hpc.filterwise.partition import Deal, arriving, leaving
from loft_hpc.filterwise.subnetwork import SubNetwork, layouts_of, partitioned_layouts
from loft_hpc.models.groups import FilterGroup, Holding, Selection, State, collect, everything
from loft_hpc.training.buffers import Layout


class Exchange(ABC):
    """One rank's side of the exchange between two deals; `run` is collective.

    After it, this rank's partitioned parameters are those of the new deal and the shared ones are averaged. How the filters get there
    does not change what is learnt: every exchange gives bitwise the same training.
    """

    on_gpu = False
    """Whether it works as suits a GPU (loft_hpc.filterwise.gpu_exchange)."""

    def __init__(self, sub: SubNetwork, full: Layout, groups: Sequence[FilterGroup], world: World, transport: torch.dtype):
        self._sub = sub
        self._full = full
        self._groups = groups
        self._world = world
        self._transport = transport
        self._copies = 2 if sub.momentum_travels else 1
        self.averaging = Averaging(sub.shared.content, world, transport, self.on_gpu)
        self._layouts = partitioned_layouts(full, groups, world.size)
        self._counts = [layout.numel * self._copies for layout in self._layouts]

    def agree(self) -> None:
        """Take note that all workers have the shared parameters alike now: at the start, and where they were loaded."""
        if self._world.size > 1:
            self.averaging.agree()

    def run(self, old: Deal, new: Deal, average: bool = True) -> None:
        """After the local steps. Without `average` the shared parameters stay each worker's own for another round."""
        if self._world.size == 1:
            return
        self.pack(old, new)
        self.communicate(average)
        self.unpack(old, new)

    def communicate(self, average: bool = True) -> None:
        """The collectives: the partitioned parameters and, unless this round does not average, the shared ones."""
        averaging = self.averaging.start() if average else None
        moving = self.send_partitioned()
        if averaging:
            averaging()
        moving()

    @abstractmethod
    def pack(self, old: Deal, new: Deal) -> None:
        """Lay out what this rank sends."""

    @abstractmethod
    def send_partitioned(self) -> Callable[[], object]:
        """The collective of the partitioned parameters; what is returned waits for it."""

    @abstractmethod
    def unpack(self, old: Deal, new: Deal) -> None:
        """Fill this rank's partitioned parameters with the filters that the new deal gives it."""

    def merge(self, deal: Deal, momentum: bool = False) -> dict[str, Tensor]:
        """The full state of parameters (or of their momentum) in the given, current deal, as new tensors. Collective."""
        own = self._sub.partitioned.momentum if momentum else self._sub.partitioned.values
        counts = [layout.numel for layout in self._layouts]
        gathered = torch.empty(sum(counts), device=own.device)
        self._world.all_gather(own, gathered, counts, "merge")()
        pieces = gathered.split(counts)
        holdings = [Holding(layout.views(piece), hand) for layout, piece, hand in zip(self._layouts, pieces, deal, strict=True)]
        return self._merged(holdings, momentum)

    def _merged(self, holdings: Sequence[Holding], momentum: bool) -> dict[str, Tensor]:
        shared = self._sub.shared
        merged = self._full.views(torch.empty(self._full.numel, device=shared.values.device))
        collect(merged, everything(self._groups), holdings, self._groups)
        return merged | shared.layout.views((shared.momentum if momentum else shared.values).clone())

    def _own_views(self) -> list[State]:
        """This rank's partitioned parameters and, where it travels, their momentum."""
        buffer = self._sub.partitioned
        return [buffer.layout.views(flat) for flat in (buffer.values, buffer.momentum)[: self._copies]]


class AllGatherExchange(Exchange):
    """Every rank gets all sub-networks: afterwards each can merge the full network, and cut its next sub-network, by itself.

    The gathered buffer is the merged state: worker s's part of it is laid out as s's own buffer, and the deal says which filter
    lies where. Buffers are allocated here, once.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        own = self._sub.partitioned.content
        # A single worker's buffer is the full state already.
        self._gathered = own if self._world.size == 1 else torch.zeros(sum(self._counts), device=own.device)
        exact = self._transport == own.dtype
        self._outgoing = own if exact else torch.zeros_like(own, dtype=self._transport)
        self._incoming = self._gathered if exact else torch.zeros_like(self._gathered, dtype=self._transport)
        self._gathered_deal: Deal | None = None

    def agree(self) -> None:
        super().agree()
        self._gathered_deal = None  # what was loaded is not what was gathered

    def pack(self, old: Deal, new: Deal) -> None:
        if self._outgoing is not self._sub.partitioned.content:
            self._outgoing.copy_(self._sub.partitioned.content)

    def send_partitioned(self) -> Callable[[], object]:
        return self._world.all_gather(self._outgoing, self._incoming, self._counts, "partitioned")

    def unpack(self, old: Deal, new: Deal) -> None:
        if self._incoming is not self._gathered:
            self._gathered.copy_(self._incoming)
            start = sum(self._counts[: self._world.rank])
            self._gathered[start : start + self._counts[self._world.rank]].copy_(self._sub.partitioned.content)
        self._fill(old, new)
        self._gathered_deal = old

    def _fill(self, old: Deal, new: Deal) -> None:
        for copy, views in enumerate(self._own_views()):
            collect(views, new[self._world.rank], self._holdings(old, copy), self._groups)

    def merge(self, deal: Deal, momentum: bool = False) -> dict[str, Tensor]:
        """As above; without any message where the gathered buffer is what everybody has, to the last bit."""
        if self._gathered_deal is None or self._incoming is not self._gathered:
            return super().merge(deal, momentum)
        return self._merged(self._holdings(self._gathered_deal, int(momentum)), momentum)

    def _holdings(self, deal: Deal, copy: int) -> list[Holding]:
        holdings = []
        for layout, piece, hand in zip(self._layouts, self._gathered.split(self._counts), deal, strict=True):
            holdings.append(Holding(layout.views(_copy_of(piece, copy, self._copies)), hand))
        return holdings


class AllToAllExchange(Exchange):
    """Each filter goes to the rank that trains it next and to nobody else: (1 - 1/S) P in total, on average over deals.

    No rank holds more than its own share between evaluations: the parameters, and buffers for what leaves, arrives and stays.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._exact = self._transport == self._sub.partitioned.content.dtype
        self._allocate()

    def _allocate(self) -> None:
        own = self._sub.partitioned.content
        # At most everything that a rank holds is replaced.
        self._leaves = torch.zeros_like(own, dtype=self._transport)
        self._arrives = torch.zeros_like(own, dtype=self._transport)
        self._stays = torch.zeros_like(own)
        self._rounded = own if self._exact else torch.zeros_like(own, dtype=self._transport)
        self._home = self._arrives if self._exact else torch.zeros_like(own)

    def pack(self, old: Deal, new: Deal) -> None:
        rank = self._world.rank
        if not self._exact:
            self._rounded.copy_(self._sub.partitioned.content)
        leaves = leaving(old, new, rank, self._groups)
        layouts = self._layouts_of(leaves)
        self.sent_counts = self._sizes(layouts)
        pieces = self._pieces(self._leaves, self.sent_counts, layouts)
        for worker, (layout, piece, hand) in enumerate(zip(layouts, pieces, leaves, strict=True)):
            source = self._sub.partitioned.content if worker == rank else self._rounded
            for copy in range(self._copies):
                mine = self._sub.partitioned.layout.views(_copy_of(_movable(source), copy, self._copies))
                collect(layout.views(_copy_of(_movable(piece), copy, self._copies)), hand, [Holding(mine, old[rank])], self._groups)
        self._expect(old, new)

    def _expect(self, old: Deal, new: Deal) -> None:
        """How what arrives will be laid out."""
        rank = self._world.rank
        self._arrivals = arriving(old, new, rank, self._groups)
        self._arrival_layouts = self._layouts_of(self._arrivals)
        self.received_counts = self._sizes(self._arrival_layouts)

    def send_partitioned(self) -> Callable[[], object]:
        leaves, arrives = self._leaves[: sum(self.sent_counts)], self._arrives[: sum(self.received_counts)]
        return self._world.all_to_all(leaves, arrives, self.sent_counts, self.received_counts, "partitioned")

    def unpack(self, old: Deal, new: Deal) -> None:
        if not self._exact:
            received = sum(self.received_counts)
            self._home[:received].copy_(self._arrives[:received])
        pieces = self._pieces(self._home, self.received_counts, self._arrival_layouts)
        for copy, views in enumerate(self._own_views()):
            holdings = [
                Holding(layout.views(_copy_of(piece, copy, self._copies)), hand)
                for layout, piece, hand in zip(self._arrival_layouts, pieces, self._arrivals, strict=True)
            ]
            collect(views, new[self._world.rank], holdings, self._groups)

    def _layouts_of(self, hands: Sequence[Selection]) -> list[Layout]:
        return layouts_of(self._full, self._groups, [{name: len(filters) for name, filters in hand.items()} for hand in hands])

    def _sizes(self, layouts: Sequence[Layout]) -> list[int]:
        """Elements to or from every worker; what stays at home does not travel."""
        return [layout.numel * self._copies * (worker != self._world.rank) for worker, layout in enumerate(layouts)]

    def _pieces(self, buffer: Tensor, sizes: list[int], layouts: Sequence[Layout]) -> list[Tensor]:
        """The buffer's part for every worker; this rank's own is what stays."""
        pieces = list(buffer[: sum(sizes)].split(sizes))
        pieces[self._world.rank] = self._stays[: layouts[self._world.rank].numel * self._copies]
        return pieces


def _copy_of(flat: Tensor, copy: int, copies: int) -> Tensor:
    """The values (0) or the momentum (1) in a flat [values | momentum], or in values alone."""
    return flat.chunk(copies)[copy] if flat.numel() else flat


def _movable(tensor: Tensor) -> Tensor:
    """The same memory in a type that numpy, which picks the filters, knows: it has no bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


EXCHANGES: dict[str, type[Exchange]] = {"allgather": AllGatherExchange, "alltoall": AllToAllExchange}
TRANSPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def full_layout(state: State, sub: SubNetwork) -> Layout:
    """The layout of all partitioned parameters of the full network, in the sub-network's order."""
    return Layout({name: tuple(state[name].shape) for name in sub.partitioned.views})
