"""`loft plan`: what the stages of a job would take, from pretraining to the last retrained ticket."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loft_hpc.analysis.timing import Cluster
from loft_hpc.jobs.dryrun import choose
from loft_hpc.jobs.prediction import Case, Outlook, course
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.source import prunable_groups
from loft_hpc.models.groups import filter_groups
from loft_hpc.tickets.counts import kept_of_each, rounded
from loft_hpc.tickets.pruning import Pruning


@dataclass(frozen=True)
class Stage:
    """One command of a job."""

    name: str
    outlook: Outlook


def expected_ticket(case: Case, pruning: Pruning, blocks: str) -> Case:
    """A ticket of a pretraining's network as far as its size is known before: `case` with the ticket's network.

    The same share of every block's filters, also where one ranking over all will decide; whole blocks without knowing
    which; the dense network for a mask of weights. Raises LoftError where nothing would be left of a block.
    """
    finder, options, dense = pruning.finder, pruning.options, case.network
    if not finder.removes_filters(options):
        network = finder.shallower(pruning.ratio, dense)
        return replace(case, network=network, masked=network == dense)
    widths = {group.name: group.width for group in prunable_groups(filter_groups(dense), blocks)}
    kept = rounded(kept_of_each(widths, pruning.ratio, "filters"), widths, getattr(options, "round_to", 1))
    return replace(case, widths=dense.hidden_widths() | kept)


def pruning_stage(case: Case, prunings: Sequence[Pruning], blocks: str, workers: int, cluster: Cluster | None) -> Stage:
    """Drawing tickets on one rank while the job holds all workers: searches of methods that train, and evaluations."""
    finder, options = prunings[0].finder, prunings[0].options
    searches = finder.trainings(options, case.network, [pruning.ratio for pruning in prunings])
    settings: PretrainSettings = case.settings
    epochs = getattr(options, "search_epochs", None) or math.ceil(course(case, workers).epochs)
    search = replace(case, settings=replace(settings, strategy="data-parallel", rounds=None, epochs=epochs))
    one = choose(search, 1, cluster).asked if searches else Outlook("", 1, seconds=0.0 if cluster else None)
    evaluation = settings.evaluation
    shown = evaluation.statistics_batches * evaluation.statistics_batch + case.shape.test_images
    flops = shown * sum(expected_ticket(case, pruning, blocks).size.flops for pruning in prunings)
    seconds = searches * one.seconds + flops / cluster.flops_per_second if cluster else None
    tickets = f"{len(prunings)} ticket{'s' * (len(prunings) > 1)}"
    return Stage(f"prune, {tickets}, on one rank", Outlook("", workers, searches * one.images, seconds))


def retraining_of(case: Case, pruning: Pruning, blocks: str, settings: RetrainSettings) -> Case:
    """The retraining of a ticket that is not there yet."""
    return replace(expected_ticket(case, pruning, blocks), settings=settings)


def summed(stages: Sequence[Stage]) -> Outlook:
    """All stages, one after the other on the same workers."""
    every = [stage.outlook for stage in stages]
    seconds = None if any(one.seconds is None for one in every) else sum(one.seconds for one in every)
    return Outlook(
        "",
        every[0].workers,
        sum(one.images for one in every),
        seconds,
        sum(one.handed_over_bytes for one in every),
        sum(one.delivered_bytes for one in every),
        sum(one.wire_bytes for one in every),
    )
