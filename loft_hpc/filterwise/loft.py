"""LoFT: rounds of local training on sub-networks, an exchange, and a fresh deal (AISTATS 2023, arXiv 2210.16169)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.exchange import EXCHANGES, TRANSPORT_DTYPES, full_layout
from loft_hpc.filterwise.gpu_exchange import exchange_class
from loft_hpc.filterwise.partition import check_workers, deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import PARTITION_RULES, State, everything, filter_groups, partitioned_groups
from loft_hpc.models.scores import filter_scores
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.interval import passes
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import MAX_STEPS, Computation, Optimisation, refuse_outside
from loft_hpc.training.stopwatch import Stopwatch
from loft_hpc.training.strategy import Advance, Strategy, bits, everybodys_scores, refuse_other_network, summed
from loft_hpc.training.trainer import Trainer

MOMENTUM_RULES = ("reset", "carry")
MAX_UNIT = 64
"""Largest `partition_unit`; no GPU computes faster for a larger one."""


@dataclass(frozen=True)
class LoftSettings:
    """What LoFT adds to ordinary training."""

    local_iterations: int = 8
    """SGD steps of a worker between two exchanges (the release uses 15 on ImageNet)."""
    partition: str = "paper"
    """Which blocks are dealt: `paper` (all but stage 1 and strided blocks) or `all-blocks`."""
    partition_unit: int = 1
    """Workers hold multiples of so many filters of a block, where its width allows it: GPUs compute fastest with multiples of 8."""
    momentum_across_rounds: str = "reset"
    """`reset`: momentum starts at 0 every round, as in the release. `carry`: it travels with its parameters."""
    exchange: str = "allgather"
    """How filters reach who trains them next: `allgather` (all to all ranks) or `alltoall` (each to that rank alone)."""
    average_every: int = 1
    """Rounds between two averagings of the shared parameters. Where an epoch ends or a snapshot is taken they are averaged as well,
    since the full network is looked at there."""
    transport_dtype: str = "float32"
    """Type of what travels; float32 is kept at home."""
    shard_data: bool = False
    """Give the ranks disjoint shards of every epoch, in place of the whole data in an order of their own."""

    def __post_init__(self):
        refuse_outside(self, local_iterations=(1, MAX_STEPS), average_every=(1, MAX_STEPS), partition_unit=(1, MAX_UNIT))
        if self.partition not in PARTITION_RULES:
            raise LoftError(f"unknown partition rule '{self.partition}': choose one of {', '.join(PARTITION_RULES)}", usage=True)
        if self.momentum_across_rounds not in MOMENTUM_RULES:
            raise LoftError(f"--momentum-across-rounds is one of {', '.join(MOMENTUM_RULES)}", usage=True)
        if self.exchange not in EXCHANGES:
            raise LoftError(f"unknown exchange '{self.exchange}': choose one of {', '.join(EXCHANGES)}", usage=True)
        if self.transport_dtype not in TRANSPORT_DTYPES:
            raise LoftError(f"unknown transport type '{self.transport_dtype}': choose one of {', '.join(TRANSPORT_DTYPES)}", usage=True)


def averages(settings: LoftSettings, number: int, begin: int, end: int, looks: Sequence[int], total: int) -> bool:
    """Whether round `number` (from 1), from step `begin` to `end`, averages the shared parameters.

    It does every `average_every` rounds, and wherever the full network is looked at: at multiples of `looks` (steps of an epoch, steps
    between snapshots) and at the end.
    """
    return number % settings.average_every == 0 or any(passes(begin, end, every) for every in looks) or end == total


class Loft(Strategy):
    """One rank's side of LoFT; `advance` is a round. In a world of one rank it is ordinary training of the full network."""

    def __init__(
        self, architecture: Architecture, initial: State, settings: LoftSettings, optimisation: Optimisation, data: DataSet,
        order: Order, total_steps: int, seed: int, computation: Computation, device: torch.device, world: World, snapshot_steps: int = 0,
    ):  # fmt: skip
        self.total_steps = total_steps
        self.steps_per_epoch = order.steps_per_epoch
        self.schedule = Schedule(optimisation, total_steps, order.steps_per_epoch)
        self.batch_images = order.batch_size
        self.expected_rounds = -(-total_steps // settings.local_iterations)
        self.any_world_size = not settings.shard_data  # shards of another size would make epochs of another length
        self._looks = (order.steps_per_epoch, snapshot_steps)
        self._settings, self._seed, self._order, self._data, self._world = settings, seed, order, data, world
        self._all_groups = filter_groups(architecture)
        self.groups = partitioned_groups(self._all_groups, settings.partition, settings.partition_unit)
        check_workers(self.groups, world.size)
        self._names = list(initial)
        self._step, self._round = 0, 0
        self._alike = True
        """Whether all workers have the same shared parameters; so they do wherever the full state is asked for."""
        # One rank alone keeps its momentum, whatever the rule: that is plain training.
        self._carry = settings.momentum_across_rounds == "carry" or world.size == 1
        self._sub = SubNetwork(architecture, self.groups, world.rank, world.size, device, momentum_travels=self._carry)
        self._trainer = Trainer(self._sub.network, (self._sub.shared, self._sub.partitioned), self.schedule, computation)
        self._full = full_layout(initial, self._sub)
        self._exchanging = Stopwatch(device)
        transport = TRANSPORT_DTYPES[settings.transport_dtype]
        self._exchange = exchange_class(settings.exchange, device.type == "cuda" and world.size > 1)(
            self._sub, self._full, self.groups, world, transport
        )
        self._deal = deal(self.groups, world.size, seed, 0)
        # The full state, until the next round makes it the past.
        self._whole: State | None = self._broadcast(initial)
        self._sub.load(self._whole, self._deal[world.rank])
        self._exchange.agree()

    def _broadcast(self, initial: State) -> State:
        """Rank 0's initial state on every rank: two flat buffers, as in every round."""
        shared = self._sub.shared.layout
        state: dict[str, Tensor] = {}
        for layout, purpose in ((self._full, "partitioned"), (shared, "shared")):
            flat = torch.empty(layout.numel, device=self._sub.shared.values.device)
            views = layout.views(flat)
            for name, view in views.items():
                view.copy_(initial[name])
            self._world.broadcast_(flat, purpose)()
            state |= views
        return {name: state[name] for name in self._names}

    def advance(self, limit: int | None = None) -> Advance:
        """A round, wherever `limit` lies: local steps on this rank's sub-network, the exchange, and the next deal."""
        self._whole = None
        if not self._carry:
            self._trainer.reset_momentum()
        steps = min(self._settings.local_iterations, self.total_steps - self._step)
        batches = self._world.paced(self._data.train_batches(self._order, self._step, steps))
        losses = self._trainer.steps(zip(batches), self._step)
        total_loss, diverged_at = summed(losses, self._step, self._sub.shared.values, self._sub.partitioned.values)
        self._alike = averages(self._settings, self._round + 1, self._step, self._step + steps, self._looks, self.total_steps)
        self._step += steps
        self._round += 1
        following = deal(self.groups, self._world.size, self._seed, self._round)
        with self._exchanging.running():
            self._exchange.run(self._deal, following, average=self._alike)
        self._deal = following
        return Advance(self._step, total_loss / steps, self._exchanging.take(), self._round, diverged_at)

    @property
    def settled(self) -> bool:
        return self._alike

    def full_state(self) -> dict[str, Tensor]:
        if not self._alike:
            raise RuntimeError("there is no full state before the shared parameters are averaged")
        if self._whole is None:
            merged = self._exchange.merge(self._deal)
            self._whole = {name: merged[name] for name in self._names}
        return dict(self._whole)

    def filter_scores(self) -> dict[str, Tensor]:
        if not self._alike:
            raise RuntimeError("there are no scores of the full network before the shared parameters are averaged")
        held = dict(self._deal[self._world.rank])
        if self._world.rank == 0:  # answers for what everybody has
            held = everything(self._all_groups) | held
        mine = [group for group in self._all_groups if group.name in held]
        state = self._sub.shared.views | self._sub.partitioned.views
        return everybodys_scores(filter_scores(state, mine), held, self._all_groups, self._world)

    def digest(self) -> int:
        return bits(self._sub.shared.content) if self._alike else 0

    def checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"parameters/{name}": tensor for name, tensor in self.full_state().items()}
        if self._carry:
            momentum = self._exchange.merge(self._deal, momentum=True)
            tensors |= {f"momentum/{name}": tensor for name, tensor in momentum.items()}
        return tensors, {"round": self._round}

    def restore(self, checkpoint: Checkpoint) -> None:
        tensors, whole = checkpoint.tensors, self.full_state()
        kinds = ("parameters", "momentum") if any(key.startswith("momentum/") for key in tensors) else ("parameters",)
        refuse_other_network(tensors, {f"{kind}/{name}": tensor for kind in kinds for name, tensor in whole.items()})
        if "round" not in checkpoint.progress:
            raise LoftError("the checkpoint says no round: it belongs to another strategy")
        state, *momentum = ({name: tensors[f"{kind}/{name}"] for name in whole} for kind in kinds)
        self._step, self._round = checkpoint.step, checkpoint.progress["round"]
        self._deal = deal(self.groups, self._world.size, self._seed, self._round)
        self._whole = {name: state[name] for name in self._names}
        self._alike = True
        self._sub.load(state, self._deal[self._world.rank])
        if momentum:
            self._sub.load_momentum(momentum[0], self._deal[self._world.rank])
        self._exchange.agree()
