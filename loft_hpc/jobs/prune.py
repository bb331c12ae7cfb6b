"""`loft prune`: a run in, tickets in its folder out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from loft_hpc.analysis.size import Size, network_size
from loft_hpc.comm.world import World
from loft_hpc.data.registry import open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import snapshot_name
from loft_hpc.jobs.settings import to_json
from loft_hpc.models.groups import FilterGroup, everything, filter_groups, slice_state
from loft_hpc.runs.run import Run
from loft_hpc.tickets.finders import FINDERS, Pruning
from loft_hpc.tickets.ticket import Ticket, refuse_existing
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import Score, judge, network_for

BLOCK_CHOICES = ("all", "release")
FINAL = "final"


@dataclass(frozen=True)
class Pruned:
    """A ticket as it was made: before any retraining, but with statistics re-estimated for its score."""

    ticket: Ticket
    pruning: Pruning
    size: Size
    dense: Size
    score: Score


def prunable_groups(groups: Sequence[FilterGroup], blocks: str) -> list[FilterGroup]:
    """`all`: every residual block. `release`: as in LoFT's release, all but the first block of each stage."""
    if blocks == "all":
        return list(groups)
    return [group for group in groups if not group.name.endswith(".0")]


def draw_tickets(run: Run, prunings: Sequence[Pruning], blocks: str, at: str, name: str | None = None) -> list[Ticket]:
    """A ticket for each pruning, in memory: of the run's `final` network, or of a snapshot (`init`, `epoch:K`, `step:K`).

    Raises LoftError where the run has no such network, or where it does not fit the run's description.
    """
    settings, architecture, groups = settings_of(run), run.architecture, filter_groups(run.architecture)
    if at == FINAL:
        file, state = run.model_path, run.read_model()
    else:
        snapshot = snapshot_name(at, "--at")
        file, state = run.snapshots.path(snapshot), run.snapshots.read(snapshot)
    network_for(architecture, None, state, torch.device("cpu"), str(file))
    pruned_groups = prunable_groups(groups, blocks)
    tickets = []
    for pruning in prunings:
        kept = FINDERS[pruning.method](state, pruned_groups, pruning)
        selection = everything(groups) | dict(kept)
        provenance = {
            **asdict(pruning),
            "blocks": blocks,
            "run": run.path.name,
            "drawn_from": str(file.relative_to(run.path)),
            "data": to_json(settings.data),
            "evaluation": to_json(settings.evaluation),
            "seed_of_run": settings.seed,
        }
        folder = run.path / "tickets" / (name or ticket_name(pruning, blocks, at))
        tickets.append(Ticket(folder, architecture, selection, slice_state(state, selection, groups), provenance))
    return tickets


def prune(
    path: Path, prunings: Sequence[Pruning], blocks: str, at: str, name: str | None, data_dir: str | None, device: str, world: World
) -> list[Pruned]:
    """Make a ticket for each pruning, of the network that `at` names. Collective. Nothing is written if one name is taken already."""
    if name and len(prunings) > 1:
        raise LoftError("--name names one ticket: give one --ratio with it", usage=True)
    run = Run.open_to_write(path)
    settings, architecture = settings_of(run), run.architecture
    tickets = draw_tickets(run, prunings, blocks, at, name)
    chosen_device, _ = place(device, "float32", world)
    data = open_data(settings.data.at(data_dir), chosen_device, world)
    dense = network_size(architecture, None, data.info.image_size)
    world.on_root(lambda: [refuse_existing(ticket.path) for ticket in tickets])
    world.on_root(lambda: [ticket.write() for ticket in tickets])
    results = []
    for ticket, pruning in zip(tickets, prunings, strict=True):
        network = network_for(architecture, ticket.hidden_widths, ticket.state, chosen_device, str(ticket.path))
        size = network_size(architecture, ticket.hidden_widths, data.info.image_size)
        results.append(Pruned(ticket, pruning, size, dense, judge(network, data, settings.evaluation, world)))
    return results


def ticket_name(pruning: Pruning, blocks: str, at: str) -> str:
    """METHOD-DETAILS-RATIO, for instance magnitude-l2-0.8, magnitude-l1-global-0.5, random-seed3-0.8 or magnitude-l2-0.8-epoch-3."""
    details = [pruning.method]
    details.append(f"seed{pruning.seed}" if pruning.method == "random" else pruning.criterion)
    if pruning.scope != "layer":
        details.append(pruning.scope)
    if blocks != "all":
        details.append(blocks)
    return "-".join([*details, f"{pruning.ratio:g}", *([] if at == FINAL else [at.replace(":", "-")])])
