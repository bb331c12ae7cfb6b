"""`loft check`: is it a winning ticket? The sanity checks of Frankle et al. (2021, arXiv 2009.08576) and of "Rare Gems" (2202.12002)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.analysis.statistics import mean_interval
from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.registry import open_data
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.files import read_tensors, refuse_links_outside
from loft_hpc.jobs.retrain import RetrainSettings, retrain, snapshot_name
from loft_hpc.jobs.settings import deciding, from_json, option_of
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.jsontext import finite_or_none
from loft_hpc.models.groups import filter_groups, parameters_of
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run
from loft_hpc.tickets.finders.magnitude import as_mask
from loft_hpc.tickets.finders.random import even_counts, smart_ratios
from loft_hpc.tickets.masks import FilterMask, Mask, WeightMask
from loft_hpc.tickets.score_search import signed_constants
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.device import place
from loft_hpc.training.watching import Oversight

TICKET, DENSE = "ticket", "dense"
CONTROLS = {
    "shuffled": "as many units of every layer, others",
    "reinitialised": "the same units, drawn anew",
    "inverted": "as many units of every layer, those with the lowest scores",
    "random": "the same number altogether, at densities that know nothing of the ticket",
}
VERDICTS = ("winning", "better than random", "no ticket")


@dataclass(frozen=True)
class CheckSettings:
    seeds: int = 3
    xi: float = 1.0
    """Percentage points by which a winning ticket may stay behind the dense network."""
    name: str = "default"
    """Folder under TICKET/checks; one for each recipe of retraining."""

    def __post_init__(self):
        if not 1 <= self.seeds <= 1000:
            raise LoftError(f"--seeds {self.seeds} must lie between 1 and 1000", usage=True)
        if not 0 <= self.xi <= 100:
            raise LoftError(f"--xi {self.xi:g} must lie between 0 and 100 percentage points", usage=True)


@dataclass(frozen=True)
class Variant:
    """The ticket, the dense network or a control, retrained."""

    name: str
    accuracies: tuple[float, ...]
    """By seed, 0 to 1."""
    mean: float
    half_width: float
    """Of the 95 % interval; not a number for one seed."""
    advantage: float
    """Of the ticket over it, percentage points, meaned over the seeds."""
    advantage_half_width: float


@dataclass(frozen=True)
class Checked:
    variants: Sequence[Variant]
    verdict: str
    why: str
    note: str | None = None
    """About the images that everything was retrained on."""
    pruning_ratio: float | None = None
    """Share of the units that the ticket removes."""
    emptied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Layers of which a mask of weights keeps none, by variant; with the first seed."""


class CheckWatcher(Protocol):
    """Who is told of the progress."""

    def trained(self, variant: str, seed: int, accuracy: float, done: int, of: int) -> None: ...


def check(
    path: Path, settings: CheckSettings, recipe: Callable[[Ticket], RetrainSettings], world: World, watcher: CheckWatcher, quiet: Oversight
) -> Checked:
    """Retrain the ticket, the dense network and the controls, `seeds` times each, with one budget. Collective.

    Every training is one rank's, all ranks train side by side. What is done is not done again: trainings are kept under TICKET/checks, and
    one that was interrupted goes on. Raises LoftError where the ticket's run is not at hand, or where a training failed (the others are
    done first), and Interrupted on all ranks where one was told to end.
    """
    ticket = Ticket.read(path)
    world.on_root(lambda: refuse_links_outside(path))
    retraining, removed = recipe(ticket), ticket.pruning_ratio
    variants = variants_of(ticket, retraining.rewind)
    work = [(name, seed) for name in variants for seed in range(settings.seeds)]
    device, _ = place(retraining.computation.device, retraining.computation.precision, world)
    note = meet(TrainedOn.of(path, ticket.dense), open_data(retraining.data, device, world).info)
    folders = {(name, seed): path / "checks" / settings.name / f"{name}-seed{seed}" for name, seed in work}
    world.on_root(lambda: [_refuse_other_recipe(folders[name, seed], replace(retraining, rewind="none", seed=seed)) for name, seed in work])
    mine, failures, told, alone = [], [], False, world.alone()
    share = work[world.rank :: world.size]
    for number, (name, seed) in enumerate(share, start=1):
        alone.ledger = Ledger()
        own = replace(retraining, rewind="none", seed=seed)
        try:
            _, outcome = retrain(variants[name](seed), own, folders[name, seed], True, alone, quiet)
        except Interrupted:
            told = True
            break
        except LoftError as problem:
            failures.append(f"{name}, seed {seed}: {problem}")
            continue
        mine.append((name, seed, outcome.score.accuracy))
        watcher.trained(name, seed, outcome.score.accuracy, number, len(share))
    # what befell one rank is told by all together, when each has done what it could
    world.wait_quietly()
    parts = world.gather_objects((mine, failures, told))
    if any(part[2] for part in parts):
        raise Interrupted(f"{path}: told to end; what is trained is kept")
    for _, problems, _ in parts:
        if problems:
            raise LoftError(f"{problems[0]} (what is trained is kept in {path / 'checks' / settings.name})")
    results = {(name, seed): accuracy for part in parts for name, seed, accuracy in part[0]}
    checked = judge_ticket({name: [results[name, seed] for seed in range(settings.seeds)] for name in variants}, settings.xi)
    emptied = {name: layers for name, variant in variants.items() if (layers := variant(0).mask.emptied())}
    return replace(checked, note=note, pruning_ratio=removed, emptied=emptied)


def _refuse_other_recipe(folder: Path, settings: RetrainSettings) -> None:
    """One name stands for one recipe. Raises LoftError, naming the first difference."""
    if not (folder / "run.json").exists():
        return
    before = deciding(from_json(RetrainSettings, Run.open(folder).configuration))
    for name, value in deciding(settings).items():
        if before[name] != value:
            raise LoftError(
                f"{folder.parent} was made with {option_of(name)} {before[name]}: repeat that, or give this check a --name of its own"
            )


def variants_of(ticket: Ticket, rewind: str) -> dict[str, Callable[[int], Ticket]]:
    """What to retrain, given a seed. Weights are those at the point that `rewind` names, by default those that the ticket has."""
    weights, dense_weights = _states(ticket, rewind)
    own = replace(ticket, state=ticket.mask.carve(weights) if rewind != "none" else parameters_of(ticket.state))
    constants = rewind == "none" and ticket.provenance.get("initialisation") == "signed-constants"

    def other(name: str, mask: Mask, state: Mapping[str, Tensor]) -> Ticket:
        return replace(ticket, mask=mask, state=mask.carve(state), scores=None, provenance=ticket.provenance | {"control": name})

    def anew(seed: int) -> dict[str, Tensor]:
        # not the draw of a run with this seed, which may be the one that the ticket comes from
        drawn = {name: tensor.detach() for name, tensor in build(ticket.dense, seed=seeds.derive(seed, "init", 1)).named_parameters()}
        return signed_constants(drawn) if constants else drawn

    made: dict[str, Callable[[int], Ticket]] = {
        DENSE: lambda seed: other(DENSE, FilterMask(ticket.dense, {}), dense_weights),
        TICKET: lambda seed: own,
        "shuffled": lambda seed: other("shuffled", ticket.mask.shuffled(seed), weights),
        "reinitialised": lambda seed: other("reinitialised", ticket.mask, anew(seed)),
    }
    if ticket.scores is not None:
        made["inverted"] = lambda seed: other("inverted", ticket.mask.inverted(ticket.scores), weights)
    if ticket.mask.kind != "layer":  # random blocks are shuffled blocks
        made["random"] = lambda seed: other("random", random_like(ticket.mask, seed, ticket.provenance.get("round_to")), weights)
    return made


def random_like(mask: Mask, seed: int, round_to: Any = 1) -> Mask:
    """As many units altogether. Of filters: the same density in every block. Of weights: smart ratios, as in the Gem-Miner paper.

    Where the filters of a ticket were rounded to a multiple, every block has a multiple here too, if that many can be dealt in multiples.
    """
    draw = np.random.default_rng(seeds.derive(seed, "ticket", 3))
    if isinstance(mask, WeightMask):
        sizes = {name: kept.numel() for name, kept in mask.kept.items()}
        counts = (
            smart_ratios(sizes, mask.count) if mask.count >= len(sizes) else {name: int(kept.sum()) for name, kept in mask.kept.items()}
        )
        drawn = {name: np.sort(draw.permutation(sizes[name])[: counts[name]]) for name in sizes}
        return WeightMask(mask.dense, {name: as_mask(drawn[name], own.shape) for name, own in mask.kept.items()})
    groups = filter_groups(mask.dense)
    multiple = round_to if type(round_to) is int and round_to > 1 else 1
    widths, keep = {group.name: group.width for group in groups}, sum(mask.hidden_widths.values())
    if keep % multiple or min(widths.values()) < multiple or keep > sum(width // multiple * multiple for width in widths.values()):
        multiple = 1  # blocks that are kept whole, and of no such width
    counts = even_counts({name: width // multiple for name, width in widths.items()}, keep // multiple)
    chosen = {group.name: np.sort(draw.permutation(group.width)[: multiple * counts[group.name]]) for group in groups}
    return FilterMask(mask.dense, {name: torch.from_numpy(kept) for name, kept in chosen.items()})


def _states(ticket: Ticket, rewind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The full network's parameters that the ticket's weights are a part of, and those that the dense network starts from."""
    if not (ticket.run_path / "run.json").is_file():
        raise LoftError(
            f"{ticket.path} does not lie in its run any more (RUN/tickets/NAME), whose dense network the checks need: move it back"
        )
    run = Run.open(ticket.run_path)
    if rewind != "none":
        state = parameters_of(run.snapshots.read(snapshot_name(rewind, "--rewind")))
        return state, state
    dense = parameters_of(_drawn_from(ticket, run))
    return (signed_constants(dense) if ticket.provenance.get("initialisation") == "signed-constants" else dense), dense


def _drawn_from(ticket: Ticket, run: Run) -> dict[str, Tensor]:
    """The file that the ticket names; where that is a search of its own, whose network is masked already, the run's final network."""
    name = ticket.provenance.get("drawn_from", "model.safetensors")
    try:
        inside = isinstance(name, str) and (run.path / name).resolve().is_relative_to(run.path.resolve())
    except (ValueError, RuntimeError, OSError):  # a null byte, links in a circle, a name without end
        inside = False
    if not inside:
        raise LoftError(f"{ticket.path / 'ticket.json'} says it was drawn from outside of its run: restore it or prune again")
    return run.read_model() if name.startswith("searches/") else read_tensors(run.path / name)


def judge_ticket(accuracies: Mapping[str, Sequence[float]], xi: float) -> Checked:
    """The verdict, from accuracies (0 to 1) by variant and seed, differences being taken seed by seed with 95 % intervals.

    `better than random`: ahead of every control by more than the interval. `winning`: that, and behind the dense network by no more than
    `xi` percentage points even at the interval's lower end. One seed has no interval and proves nothing.
    """
    own = accuracies[TICKET]
    variants = []
    for name, values in accuracies.items():
        mean, half = mean_interval(values)
        ahead, ahead_half = mean_interval([100 * (mine - other) for mine, other in zip(own, values, strict=True)])
        variants.append(Variant(name, tuple(values), mean, half, ahead, ahead_half))
    surely = {variant.name: variant.advantage - variant.advantage_half_width for variant in variants}
    level = [name for name in accuracies if name not in (TICKET, DENSE) and not surely[name] > 0]
    within = surely[DENSE] >= -xi
    if level:
        return Checked(variants, VERDICTS[2], f"not surely better than {', '.join(level)}")
    if within:
        return Checked(variants, VERDICTS[0], f"better than every control, and surely within {xi:g} points of the dense network")
    return Checked(variants, VERDICTS[1], f"better than every control, but not surely within {xi:g} points of the dense network")


def to_fields(checked: Checked) -> dict[str, Any]:
    """For JSON: units in the names."""
    return {
        "verdict": checked.verdict,
        "why": checked.why,
        "note": checked.note,
        "pruning_ratio": checked.pruning_ratio,
        "variants": [
            {
                "variant": variant.name,
                "emptied_layers": list(checked.emptied.get(variant.name, ())),
                "accuracies": list(variant.accuracies),
                "accuracy_mean": variant.mean,
                "accuracy_half_width": finite_or_none(variant.half_width),
                "ticket_advantage_points": variant.advantage,
                "ticket_advantage_half_width_points": finite_or_none(variant.advantage_half_width),
            }
            for variant in checked.variants
        ],
    }
