"""A worker's sub-network: the one network class with narrower hidden widths, its parameters in two flat buffers."""

from collections.abc import Mapping, Sequence

import torch

from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import FilterGroup, Selection, State, member_names, slice_state
from loft_hpc.models.resnet import build
from loft_hpc.training.buffers import Layout, ParameterBuffer
from loft_hpc.training.trainer import named_subset


class SubNetwork:
    """The share of one worker.

    `shared` holds the parameters that every worker has whole, `partitioned` those of its own filters; each is one buffer, laid
    out as the network uses it, which is also how it travels: nothing is packed.
    """

    def __init__(
        self, architecture: Architecture, groups: Sequence[FilterGroup], worker: int, workers: int, device: torch.device,
        momentum_travels: bool,
    ):  # fmt: skip
        widths = {group.name: group.shares(workers)[worker] for group in groups}
        self.network = build(architecture, widths).to(device, memory_format=torch.channels_last)
        self.groups = groups
        self.momentum_travels = momentum_travels
        members = member_names(groups)
        names = [name for name, _ in self.network.named_parameters()]
        self.partitioned = ParameterBuffer(named_subset(self.network, members), momentum_travels)
        self.shared = ParameterBuffer(named_subset(self.network, set(names) - members), momentum_travels)

    def load(self, state: State, selection: Selection) -> None:
        """Become the part of a full state that holds the filters of `selection`."""
        self._fill({name: view for buffer in self._buffers for name, view in buffer.views.items()}, state, selection)

    def load_momentum(self, momentum: State, selection: Selection) -> None:
        """The same for the momentum of a full state's parameters."""
        views = {name: view for buffer in self._buffers for name, view in buffer.layout.views(buffer.momentum).items()}
        self._fill(views, momentum, selection)

    def _fill(self, views: State, state: State, selection: Selection) -> None:
        part = slice_state(state, selection, self.groups)
        for name, view in views.items():
            view.copy_(part[name])

    @property
    def _buffers(self) -> tuple[ParameterBuffer, ParameterBuffer]:
        return self.shared, self.partitioned


def partitioned_layouts(full: Layout, groups: Sequence[FilterGroup], workers: int) -> list[Layout]:
    """The layout of every worker's partitioned buffer, from the full network's shapes of the partitioned parameters."""
    return layouts_of(full, groups, [{group.name: group.shares(workers)[worker] for group in groups} for worker in range(workers)])


def layouts_of(full: Layout, groups: Sequence[FilterGroup], filters: Sequence[Mapping[str, int]]) -> list[Layout]:
    """For each entry of `filters`, the layout of the partitioned parameters of so many filters of each group."""
    dimensions: Mapping[str, tuple[int, str]] = {name: (dimension, group.name) for group in groups for name, dimension in group.members}
    layouts = []
    for widths in filters:
        shapes = {}
        for name, shape in full.shapes.items():
            dimension, group = dimensions[name]
            shapes[name] = (*shape[:dimension], widths[group], *shape[dimension + 1 :])
        layouts.append(Layout(shapes))
    return layouts
