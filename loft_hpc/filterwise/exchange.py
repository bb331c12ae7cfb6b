"""What the workers tell one another after each round: shared parameters averaged, partitioned filters gathered, two collectives.

Legend: S workers, P partitioned and C shared parameters of the full network; worker s holds P_s of P. Payload of an exchange
(both sums over the workers): they hand over P + S * C values, the poster's figure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.filterwise.partition import Deal
from loft_hpc.filterwise.subnetwork import SubNetwork, partitioned_layouts
from loft_hpc.models.groups import FilterGroup, Holding, State, collect, everything
from loft_hpc.training.buffers import Layout


class AllGatherExchange:
    """Every rank gets all sub-networks: afterwards each can merge the full network, and cut its next sub-network, by itself.

    The gathered buffer is the merged state: worker s's part of it is laid out as s's own buffer, and the deal says which filter
    lies where. Buffers are allocated here, once.
    """

    def __init__(self, sub: SubNetwork, full: Layout, groups: Sequence[FilterGroup], world: World):
        self._sub = sub
        self._groups = groups
        self._world = world
        self._layouts = partitioned_layouts(full, groups, world.size)
        self._full = full
        self._counts = [layout.numel * (2 if sub.momentum_travels else 1) for layout in self._layouts]
        device = sub.partitioned.content.device
        # A single worker's buffer is the full state already.
        self._gathered = sub.partitioned.content if world.size == 1 else torch.zeros(sum(self._counts), device=device)
        self._start = torch.empty_like(sub.shared.content)

    def begin_round(self) -> None:
        """Remember the shared parameters, which all workers have alike now."""
        self._start.copy_(self._sub.shared.content)

    def run(self) -> None:
        """Exchange after the local steps.

        What is averaged is each worker's change of the shared parameters: the same mean, but where nothing changed nothing is
        rounded either, so that a learning rate of 0 leaves every bit as it was.
        """
        if self._world.size == 1:
            return
        shared = self._sub.shared.content
        shared -= self._start
        gathering = self._world.all_gather(self._sub.partitioned.content, self._gathered, self._counts, "partitioned")
        summing = self._world.all_reduce_(shared, "shared")
        gathering()
        summing()
        torch.add(self._start, shared, alpha=1 / self._world.size, out=shared)

    def redeal(self, old: Deal, new: Deal) -> None:
        """Fill this rank's partitioned parameters with the filters that the new deal gives it."""
        if self._world.size == 1:
            return
        wanted = new[self._world.rank]
        collect(self._sub.partitioned.views, wanted, self._holdings(old), self._groups)
        if self._sub.momentum_travels:
            momenta = self._sub.partitioned.layout.views(self._sub.partitioned.momentum)
            collect(momenta, wanted, self._holdings(old, momentum=True), self._groups)

    def merge(self, deal: Deal, momentum: bool = False) -> dict[str, Tensor]:
        """The full state of parameters (or of their momentum), as new tensors."""
        shared = self._sub.shared
        merged = self._full.views(torch.empty(self._full.numel, device=shared.values.device))
        collect(merged, everything(self._groups), self._holdings(deal, momentum), self._groups)
        for name, view in shared.layout.views(shared.momentum if momentum else shared.values).items():
            merged[name] = view.clone()
        return merged

    def _holdings(self, deal: Deal, momentum: bool = False) -> list[Holding]:
        holdings, offset = [], 0
        for layout, count, selection in zip(self._layouts, self._counts, deal, strict=True):
            start = offset + (layout.numel if momentum else 0)
            holdings.append(Holding(layout.views(self._gathered[start : start + layout.numel]), selection))
            offset += count
        return holdings


def full_layout(state: State, groups: Sequence[FilterGroup], sub: SubNetwork) -> Layout:
    """The layout of all partitioned parameters of the full network, in the sub-network's order."""
    return Layout({name: tuple(state[name].shape) for name in sub.partitioned.views})
