"""`loft commcost RUN...`: how many times fewer bytes a run sent than another, and what others would have sent."""

from collections.abc import Sequence
from dataclasses import dataclass

from loft_hpc.analysis.traffic import Flow, crossing_elements, data_parallel_step, pipeline_step
from loft_hpc.errors import LoftError
from loft_hpc.jobs.commcost import RunCost, Totals
from loft_hpc.pipeline.stages import cuts

SPLITS = {"stages": "cut where the network's own stages end", "balanced": "cut into stages of about equal FLOPs"}
"""`--split` of a GPipe that was not run, the poster's first, and the words for it."""


@dataclass(frozen=True)
class Ratios:
    """A run's bytes beside those of another run, the reference."""

    run: RunCost
    reference: RunCost

    @property
    def handed_over(self) -> float | None:
        """The reference's bytes over the run's: above 1 where the run handed over fewer. None where either did none."""
        return _quotient(self.reference.totals.handed_over_bytes, self.run.totals.handed_over_bytes)

    @property
    def delivered(self) -> float | None:
        return _quotient(self.reference.totals.delivered_bytes, self.run.totals.delivered_bytes)

    @property
    def wire(self) -> float | None:
        return _quotient(self.reference.totals.wire_bytes, self.run.totals.wire_bytes)

    @property
    def images(self) -> float:
        """The run's images over the reference's: above 1 where the run saw more."""
        return self.run.images / self.reference.images

    @property
    def other_differences(self) -> list[tuple[str, str, str]]:
        """(what, the run's, the reference's) of what decides the bytes as well as the strategy does."""
        sides = [
            {
                "network": f"{cost.network.model} with {cost.parameters:,} parameters",
                "data": f"{cost.data} at {cost.image_size} x {cost.image_size} pixels",
                "number of workers": str(cost.workers),
            }
            for cost in (self.run, self.reference)
        ]
        return [(name, mine, theirs) for (name, mine), theirs in zip(sides[0].items(), sides[1].values(), strict=True) if mine != theirs]


def _quotient(reference: int, own: int) -> float | None:
    return reference / own if reference and own else None


def reference_among(costs: Sequence[RunCost]) -> RunCost:
    """The run that others are compared with: the GPipe baseline where there is one, else the run that handed over most."""
    baseline = [cost for cost in costs if cost.strategy == "gpipe"]
    return max(baseline or costs, key=lambda cost: cost.totals.handed_over_bytes)


def ratios(costs: Sequence[RunCost]) -> list[Ratios]:
    """Every other run beside the reference, in their order; nothing for a run alone."""
    reference = reference_among(costs)
    return [Ratios(cost, reference) for cost in costs if cost is not reference]


@dataclass(frozen=True)
class Baseline:
    """What another strategy would have sent for a run's images on as many workers, by the closed formula."""

    strategy: str
    totals: Totals
    how: str
    """How it would have trained, where there is a choice."""
    handed_over_ratio: float | None
    """Its bytes over the run's, as in `Ratios`."""


def baselines(cost: RunCost) -> list[Baseline]:
    """GPipe and data-parallel training in place of a LoFT run; nothing for other runs, and no GPipe where it cannot be cut.

    A pipeline's bytes depend on its images alone. Data-parallel training exchanges at every step, so its batch counts:
    the images that all workers together took in a step of the run.
    """
    if cost.strategy != "loft" or cost.workers == 1:
        return []

    def baseline(strategy: str, flows: Sequence[Flow], how: str) -> Baseline:
        totals = Totals.of_flows(flows)
        return Baseline(strategy, totals, how, _quotient(totals.handed_over_bytes, cost.totals.handed_over_bytes))

    found = []
    for split, how in SPLITS.items():
        try:
            crossing = crossing_elements(cost.network, cost.image_size, cuts(cost.network, split, cost.workers, cost.image_size))
        except LoftError:
            continue
        found.append(baseline("gpipe", pipeline_step(crossing, cost.images, 1), how))
        break
    steps = [flow.times(cost.steps) for flow in data_parallel_step(cost.parameters, cost.workers)]
    how = f"in steps of {cost.images // cost.steps:,} images of all workers together"
    return [*found, baseline("data-parallel", steps, how)]
