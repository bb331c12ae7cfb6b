"""When the ticket is there: following the filters' rankings from snapshot to snapshot, and ending the training when they are stable.

Two rules. `filter-distance` (LoFT's poster: the winning ticket emerges when rankings stop changing): the distance from the newest ranking
to the one before, over the filters that the pruning ratio leaves, normalised by its expectation for a random ranking, mean over the
groups, is at most `tolerance` for `patience` successive snapshots. `mask-distance` (Early-Bird tickets, You et al. 2020, arXiv 1909.11957):
the masks of one threshold over all |BatchNorm scales| differ between the newest snapshot and each of the `patience` before it in at most
`tolerance` of their entries.

Under `filter-distance` only snapshots count whose ranking has left the initial one, by more than LEFT or the tolerance: a network that has
learnt nothing does not move either, and its ticket is a random one. Scales are all alike at the start and rank nothing, so that
`mask-distance`, which is the paper's rule, has no such condition.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loft_hpc.analysis.distance import global_mask, mask_distance, mean_normalised, score_distance
from loft_hpc.errors import LoftError
from loft_hpc.models.scores import BN_SCALE, Scores, by_group
from loft_hpc.training.settings import MAX_STEPS, refuse_outside
from loft_hpc.training.watching import Observation

LEFT = 0.1
"""Distance from the initial ranking beyond which something was learnt: docs/decisions/0009."""
RULES = {"filter-distance": (0.1, 2), "mask-distance": (0.1, 4)}
"""(tolerance, patience) that each rule has by default: docs/decisions/0009, and Early-Bird's own."""


@dataclass(frozen=True)
class Stopping:
    """When to end pretraining before its last epoch."""

    stop_when_stable: bool = False
    stability: str = "filter-distance"
    """`filter-distance` or `mask-distance`."""
    stable_ratio: float = 0.8
    """Pruning ratio of the ticket in view."""
    tolerance: float | None = None
    """Distance up to which rankings count as the same; None for the rule's own."""
    patience: int | None = None
    """Number of stable snapshots in a row; None for the rule's own."""

    def __post_init__(self):
        if self.stability not in RULES:
            raise LoftError(f"unknown stability rule '{self.stability}': choose one of {', '.join(RULES)}", usage=True)
        if not 0 < self.stable_ratio < 1:
            raise LoftError(f"--stable-ratio {self.stable_ratio:g} must lie between 0 and 1: it is a pruning ratio", usage=True)
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise LoftError(f"--tolerance {self.tolerance:g} must lie between 0 (nothing changes) and 1 (as if random)", usage=True)
        refuse_outside(self, patience=(1, MAX_STEPS))

    @property
    def limits(self) -> tuple[float, int]:
        """(tolerance, patience), the rule's own where none are given."""
        tolerance, patience = RULES[self.stability]
        return tolerance if self.tolerance is None else self.tolerance, patience if self.patience is None else self.patience


class Emergence:
    """Follows one training, on one rank."""

    def __init__(self, settings: Stopping, earlier: Iterable[Scores] = ()):
        """`earlier`: the snapshots that were seen before the training was interrupted, in their order."""
        self._settings = settings
        self._tolerance, self._patience = settings.limits
        self._masks: deque[np.ndarray] = deque(maxlen=self._patience + 1)
        self._first: dict[str, np.ndarray] | None = None
        self._rankings: dict[str, np.ndarray] = {}
        self._still = 0
        self.stable, self.stop = False, False
        for scores in earlier:
            self.see(scores)

    def see(self, scores: Scores) -> Observation:
        """Compare the next snapshot with those before it, and with the initial one."""
        ratio, before = self._settings.stable_ratio, self._rankings
        self._rankings = by_group(scores, "l2")
        self._masks.append(global_mask(by_group(scores, BN_SCALE), ratio))
        if self._first is None:
            self._first = self._rankings
            return Observation({}, None, False)
        whole = score_distance(self._rankings, before)
        in_view = mean_normalised(score_distance(self._rankings, before, ratio))
        from_first = mean_normalised(score_distance(self._rankings, self._first, ratio))
        left = from_first > min(self._tolerance, LEFT)
        differing = [mask_distance(self._masks[-1], mask) for mask in list(self._masks)[:-1]]
        self._still = self._still + 1 if left and in_view <= self._tolerance else 0
        if self._settings.stability == "filter-distance":
            self.stable = self._still >= self._patience
        else:
            self.stable = len(differing) == self._patience and max(differing) <= self._tolerance
        self.stop = self.stable and self._settings.stop_when_stable
        fields: dict[str, Any] = {
            "distance_to_previous": mean_normalised(whole),
            "top_distance_to_previous": in_view,
            "top_distance_to_initial": from_first,
            "mask_distance_to_previous": differing[-1],
            "stable": self.stable,
            "distances": {row.group: row.normalised for row in whole},
        }
        return Observation(fields, fields["distance_to_previous"], self.stop)
