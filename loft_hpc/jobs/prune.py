"""`loft prune`: a run in, tickets in its folder out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from loft_hpc.analysis.size import Size, network_size, ticket_size
from loft_hpc.data.inputs import NetworkInput
from loft_hpc.errors import LoftError
from loft_hpc.jobs.settings import to_json
from loft_hpc.jobs.source import RunSource, Surroundings
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import parameters_of
from loft_hpc.runs.run import Run
from loft_hpc.tickets import finders  # noqa: F401 (finders register themselves)
from loft_hpc.tickets.pruning import Found, Pruning
from loft_hpc.tickets.source import FINAL
from loft_hpc.tickets.ticket import Ticket, refuse_existing
from loft_hpc.training.evaluation import Score, network_for, reestimate_statistics, score


@dataclass(frozen=True)
class Pruned:
    """A ticket as it was made, before any retraining."""

    ticket: Ticket
    pruning: Pruning
    size: Size
    dense: Size
    score: Score


def draw_tickets(
    run: Run, prunings: Sequence[Pruning], blocks: str, at: str | None, around: Surroundings, name: str | None = None
) -> tuple[list[Ticket], RunSource]:
    """A ticket for each pruning (all of one method), in memory, and what they were drawn from. Collective.

    `at`: the run's `final` network or a snapshot (`init`, `epoch:K`, `step:K`); None for what suits the method. Raises LoftError where
    the run has no such network, where it does not fit the run's description, or where the method cannot apply.
    """
    finder, options = prunings[0].finder, prunings[0].options
    source = RunSource(run, blocks, at or finder.default_at(options), around, name)
    if not finder.removes_filters(options):
        blocks = "all"  # a choice of blocks whose filters may go says nothing of weights and of blocks themselves
    names = [name or own for own in ticket_names(prunings, blocks, source.at, source.architecture)]
    around.world.on_root(lambda: [refuse_existing(run.path / "tickets" / own) for own in names])
    found = finder.find(source, options, [pruning.ratio for pruning in prunings])
    return [_ticket(one, pruning, source, blocks, own) for one, pruning, own in zip(found, prunings, names, strict=True)], source


def _ticket(found: Found, pruning: Pruning, source: RunSource, blocks: str, name: str) -> Ticket:
    settings, removed = source.settings, found.mask.removed(source.groups)
    provenance = {
        **pruning.to_json(),
        "pruning_ratio": removed.share,
        "removed_units": removed.units,
        "prunable_units": removed.of,
        "emptied_layers": found.mask.emptied(),
        "blocks": blocks,
        "run": source.run.path.name,
        "drawn_from": found.drawn_from,
        "cost": asdict(found.cost),
        "data": to_json(settings.data),
        "evaluation": to_json(settings.evaluation),
        "seed_of_run": settings.seed,
        **found.details,
    }
    scores = None if found.scores is None else dict(found.scores)
    fed = NetworkInput.of(source.data.info)
    return Ticket(source.run.path / "tickets" / name, found.mask, _with_statistics(found, source), provenance, scores, fed)


def _with_statistics(found: Found, source: RunSource) -> dict[str, Tensor]:
    """The ticket's parameters, and normalisation statistics of its own: the dense network's, cut, are wrong for it.
    Collective."""
    mask, where = found.mask, str(source.run.path / found.drawn_from)
    network = network_for(mask.architecture, mask.hidden_widths, parameters_of(mask.carve(found.weights)), source.device, where)
    reestimate_statistics(network, source.data, source.settings.evaluation, source.world)
    return {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}


def prune(path: Path, prunings: Sequence[Pruning], blocks: str, at: str | None, name: str | None, around: Surroundings) -> list[Pruned]:
    """Make a ticket for each pruning, of the network that `at` names. Collective.

    Nothing is written if one name is taken already, or if one ticket cannot be evaluated.
    """
    if name and len(prunings) > 1:
        raise LoftError("--name names one ticket: give one --ratio with it", usage=True)
    world, run = around.world, Run.open_to_write(path)
    tickets, source = draw_tickets(run, prunings, blocks, at, around, name)
    data, results = source.data, []
    dense = network_size(run.architecture, None, data.info.image_size)
    for ticket, pruning in zip(tickets, prunings, strict=True):
        network = network_for(ticket.architecture, ticket.hidden_widths, ticket.state, source.device, str(ticket.path))
        size = ticket_size(ticket.architecture, ticket.hidden_widths, ticket.mask.weights, data.info.image_size)
        results.append(Pruned(ticket, pruning, size, dense, score(network, data, source.settings.evaluation, world)))
    world.on_root(lambda: [ticket.write() for ticket in tickets])
    return results


def ticket_names(prunings: Sequence[Pruning], blocks: str, at: str, dense: Architecture) -> list[str]:
    """Their tickets' names. Raises LoftError where two prunings come to the same ticket."""
    names: dict[str, Pruning] = {}
    for pruning in prunings:
        name = ticket_name(pruning, blocks, at, dense)
        if name in names:
            raise LoftError(
                f"--ratio {names[name].ratio} and --ratio {pruning.ratio} come to the same ticket, {name}: give one of them", usage=True
            )
        names[name] = pruning
    return list(names)


def ticket_name(pruning: Pruning, blocks: str, at: str, dense: Architecture) -> str:
    """METHOD-DETAILS-RATIO, for instance magnitude-l2-0.8, magnitude-l1-global-0.5, random-seed3-0.8 or magnitude-l2-0.8-epoch-3.

    Whole blocks are so few that their number stands there: layers-grasp-3of7.
    """
    finder, options = pruning.finder, pruning.options
    details = [pruning.method, *finder.label(options)]
    if blocks != "all":
        details.append(blocks)
    named = [] if at == finder.default_at(options) else [FINAL if at == FINAL else at.replace(":", "-")]
    multiple = getattr(options, "round_to", 1)
    return "-".join([*details, finder.amount(pruning.ratio, dense), *([] if multiple == 1 else [f"by{multiple}"]), *named])
