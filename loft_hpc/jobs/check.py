"""`loft check`: is it a winning ticket? The sanity checks of Frankle et al. (2021, arXiv 2009.08576) and of "Rare Gems" (2202.12002)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.analysis.size import Size, ticket_size
from loft_hpc.analysis.statistics import mean_interval
from loft_hpc.comm.alone import Alone
from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.registry import open_data
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.files import read_tensors, refuse_links_outside
from loft_hpc.jobs.comparable import start_name
from loft_hpc.jobs.retrain import RetrainSettings, retrain, snapshot_name
from loft_hpc.jobs.settings import deciding, from_json, option_of
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.jobs.verdicts import DENSE, TICKET, Comparison, Verdict, judge
from loft_hpc.jsontext import finite_or_none
from loft_hpc.models.architecture import Architecture
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

CONTROLS = {
    "shuffled": "random units, as many in every layer: the same parameters and FLOPs",
    "reinitialised": "the same units with new random weights: the same parameters and FLOPs",
    "inverted": "the lowest scores in place of the highest: the same parameters and FLOPs",
    "random": "random units at densities that do not know the ticket's: as many parameters, other FLOPs",
}
TESTS = {"practical": "none", "classical": "init"}
"""What `rewind` each test of `--test` stands for; any other is a snapshot."""


def folder_of(rewind: str) -> str:
    """Folder of a test under TICKET/checks: `default` for the practical one, else as the test is called."""
    names = {TESTS["practical"]: "default"} | {rewind: test for test, rewind in TESTS.items() if test != "practical"}
    return names.get(rewind, rewind.replace(":", "-"))


@dataclass(frozen=True)
class CheckSettings:
    seeds: int = 3
    xi: float = 1.0
    """Percentage points that make no difference: a winning ticket may stay so far behind the dense network."""
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
    size: Size
    emptied: Sequence[str]
    """Layers of which a mask of weights keeps none; with the first seed."""


@dataclass(frozen=True)
class Checked:
    variants: Sequence[Variant]
    verdict: Verdict
    start: str
    """Weights that the ticket and the dense network start from: `trained`, `initial` or a snapshot."""
    note: str | None
    """About the images that everything was retrained on."""
    pruning_ratio: float
    """Share of the units that the ticket removes."""


class CheckWatcher(Protocol):
    """Who is told of the progress."""

    def trained(self, variant: str, seed: int, accuracy: float, done: int, of: int) -> None: ...


def check(
    path: Path, settings: CheckSettings, recipe: Callable[[Ticket], RetrainSettings], world: World, watcher: CheckWatcher, quiet: Oversight
) -> Checked:
    """Retrain the ticket, the dense network and the controls, `seeds` times each, with one budget. Collective.

    Every training is one rank's, all ranks train side by side. What is done is not done again: trainings are kept under TICKET/checks, and
    one that was interrupted goes on. Raises LoftError where the ticket's run is not at hand, or where a training failed (the others are
    done first), and Interrupted on all ranks where one was preempted.
    """
    ticket = Ticket.read(path)
    world.on_root(lambda: refuse_links_outside(path))
    retraining, removed = recipe(ticket), ticket.pruning_ratio
    variants = variants_of(ticket, retraining.rewind)
    work = [(name, seed) for name in variants for seed in range(settings.seeds)]
    device, _ = place(retraining.computation.device, retraining.computation.precision, world, retraining.computation.compile)
    info = open_data(retraining.data, device, world).info
    note = meet(TrainedOn.of(path, ticket.dense), info)
    folders = {(name, seed): path / "checks" / settings.name / f"{name}-seed{seed}" for name, seed in work}
    world.on_root(lambda: [_refuse_other_recipe(folders[name, seed], replace(retraining, rewind="none", seed=seed)) for name, seed in work])
    mine, failures, told, alone = [], [], False, Alone(world)
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
        raise Interrupted(f"{path}: preempted; what is trained is kept")
    for _, problems, _ in parts:
        if problems:
            raise LoftError(f"{problems[0]} (what is trained is kept in {path / 'checks' / settings.name})")
    results = {(name, seed): accuracy for part in parts for name, seed, accuracy in part[0]}
    accuracies = {name: [results[name, seed] for seed in range(settings.seeds)] for name in variants}
    judged = [_variant(name, accuracies[name], variants[name](0), info.image_size) for name in variants]
    start = start_name(variants[TICKET](0).provenance, "none")
    return Checked(judged, judge(accuracies, settings.xi), start, note, removed)


def _variant(name: str, accuracies: Sequence[float], made: Ticket, image_size: int) -> Variant:
    mask = made.mask
    size = ticket_size(mask.architecture, mask.hidden_widths, mask.weights, image_size)
    return Variant(name, tuple(accuracies), *mean_interval(accuracies), size, mask.emptied())


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
    if rewind != "none":
        ticket = replace(ticket, provenance=ticket.provenance | {"drawn_from": f"snapshots/{snapshot_name(rewind, '--test')}.safetensors"})
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
    """Random units, about as many parameters altogether, at densities that do not know the ticket's.

    Weights: exactly as many, by smart ratios, as in the Gem-Miner paper. Filters: the same density in every block, the one whose
    parameters come nearest to the ticket's; in multiples of `round_to`, where every block has one.
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
    widths = {group.name: group.width for group in groups}
    multiple = round_to if type(round_to) is int and 1 < round_to <= min(widths.values()) else 1
    per_filter = _filter_parameters(mask.dense)
    wanted = sum(per_filter[name] * width for name, width in mask.hidden_widths.items())
    portions = {name: width // multiple for name, width in widths.items()}

    def parameters(keep: int) -> int:
        return sum(per_filter[name] * multiple * count for name, count in even_counts(portions, keep).items())

    keep = min(range(len(widths), sum(portions.values()) + 1), key=lambda keep: abs(parameters(keep) - wanted))
    counts = even_counts(portions, keep)
    chosen = {group.name: np.sort(draw.permutation(group.width)[: multiple * counts[group.name]]) for group in groups}
    return FilterMask(mask.dense, {name: torch.from_numpy(kept) for name, kept in chosen.items()})


def _filter_parameters(dense: Architecture) -> dict[str, int]:
    """Parameters of one hidden filter, by block."""
    with torch.device("meta"):
        parameters = dict(build(dense, seed=0).named_parameters())
    return {
        group.name: sum(parameters[name].numel() for name, _ in group.members if name in parameters) // group.width
        for group in filter_groups(dense)
    }


def _states(ticket: Ticket, rewind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The full network's parameters that the ticket's weights are a part of, and those that the dense network starts from."""
    if not (ticket.run_path / "run.json").is_file():
        raise LoftError(
            f"{ticket.path} does not lie in its run any more (RUN/tickets/NAME), whose dense network the checks need: move it back"
        )
    run = Run.open(ticket.run_path)
    if rewind != "none":
        state = parameters_of(run.snapshots.read(snapshot_name(rewind, "--test")))
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


def to_fields(checked: Checked) -> dict[str, Any]:
    """For JSON: units in the names."""
    comparisons = {one.name: one for one in checked.verdict.comparisons}
    return {
        "verdict": checked.verdict.name,
        "why": checked.verdict.why,
        "seeds_needed": checked.verdict.seeds_needed,
        "start": checked.start,
        "note": checked.note,
        "pruning_ratio": checked.pruning_ratio,
        "variants": [
            {
                "variant": variant.name,
                "parameters": variant.size.parameters,
                "flops": variant.size.flops,
                "emptied_layers": list(variant.emptied),
                "accuracies": list(variant.accuracies),
                "accuracy_mean": variant.mean,
                "accuracy_half_width": finite_or_none(variant.half_width),
                **_compared(comparisons.get(variant.name)),
            }
            for variant in checked.variants
        ],
    }


def _compared(one: Comparison | None) -> dict[str, Any]:
    if one is None:
        return {}
    return {
        "ticket_advantage_points": one.advantage,
        "ticket_advantage_half_width_points": finite_or_none(one.half_width),
        "passed": one.passed,
        "seeds_needed": one.seeds_needed,
    }
