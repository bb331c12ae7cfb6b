"""What all ranks must know of one another before they go on: one small all-reduce after every round, or few steps."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.training.strategy import Strategy, bit_sum

_NEVER = 2**62
_REMEDY = "start another run with a lower --lr (the checkpoints before are whole)"


class Consensus:
    """Whether the ranks go on, and as one."""

    def __init__(self, strategy: Strategy, world: World, check_ranks: bool):
        self._strategy, self._world, self._check = strategy, world, check_ranks

    def reach(self, told: bool, diverged_at: int | None) -> bool:
        """Whether any rank was `told` to end. Collective.

        Raises LoftError, on all ranks, where a rank's loss or parameters are not finite any more (`diverged_at`, the step), or where what
        should be alike on all ranks is not. An exchange may still make infinity of large numbers (the sum of changes, bfloat16): the next
        loss tells, or else the evaluation or checkpoint that comes first.
        """
        size, rank = self._world.size, self._world.rank
        diverged = _NEVER if diverged_at is None else diverged_at * size + rank
        digest = self._strategy.digest() % _NEVER if self._check else 0
        first_told, first_diverged, lowest, minus_highest = self._world.smallest([-told, diverged, digest, -digest])
        if first_diverged < _NEVER:
            step, where = divmod(first_diverged, size)
            raise LoftError(f"what rank {where} learnt, its loss or its parameters, is not finite any more at step {step}: {_REMEDY}")
        self._compare(digest, lowest, minus_highest)
        return bool(first_told)

    def confirm(self, tensors: Mapping[str, Tensor]) -> None:
        """That what every rank holds, and rank 0 is about to write, is the same everywhere and consists of finite numbers. Collective.

        Raises LoftError on all ranks where it does not: a checkpoint that nothing can go on from must not take the place of a good one.
        """
        facts = [torch.stack([tensor.isfinite().all().long(), bit_sum(tensor)]) for tensor in tensors.values()]
        # one wait for each device, not two for each tensor
        facts = [
            row for device in {one.device for one in facts} for row in torch.stack([one for one in facts if one.device == device]).tolist()
        ]
        finite, digest = all(row[0] for row in facts), sum(row[1] for row in facts) % _NEVER
        all_finite, lowest, minus_highest = self._world.smallest([finite, digest, -digest])
        if not all_finite:
            raise LoftError(f"the network's parameters, or their momentum, are not finite any more: {_REMEDY}")
        self._compare(digest, lowest, minus_highest)

    def _compare(self, digest: int, lowest: int, minus_highest: int) -> None:
        if lowest != -minus_highest:
            digests = self._world.gather_objects(digest)
            usual = Counter(digests).most_common(1)[0][0]
            strange = ", ".join(str(other) for other, theirs in enumerate(digests) if theirs != usual)
            raise LoftError(f"what all ranks should hold alike differs on rank {strange}: go on from the last checkpoint with --resume")
