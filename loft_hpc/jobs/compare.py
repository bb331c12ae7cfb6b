"""`loft compare`: retrained tickets side by side, whatever found them."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loft_hpc.analysis.energy import WORLD_GRAMS_PER_KWH, Energy, carbon_grams, grams_per_million, one_after_another
from loft_hpc.analysis.statistics import mean_interval
from loft_hpc.comm.world import World
from loft_hpc.data.registry import Reading
from loft_hpc.errors import LoftError
from loft_hpc.jobs.comparable import (
    DENSE,
    DenseRuns,
    dense_command,
    is_dense,
    pretrained_run,
    retrainings_of,
    start_images,
    start_of,
    start_text,
)
from loft_hpc.jobs.cost import cost_of
from loft_hpc.jobs.measure import Measured, MeasureSettings, measure
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.settings import deciding, from_json
from loft_hpc.jsontext import finite_or_none, to_json_text
from loft_hpc.runs.run import Run
from loft_hpc.tickets import finders  # noqa: F401 (finders register themselves)
from loft_hpc.tickets.pruning import FINDERS
from loft_hpc.tickets.ticket import Cost, Ticket
from loft_hpc.training.settings import Snapshots


@dataclass(frozen=True)
class Contender:
    """Runs that differ in their seeds alone: tickets of one method, options and ratio, or the dense networks that they come from."""

    label: str
    """The method and those of its options that are not its defaults; `dense` with the strategy for a network that was not pruned."""
    kind: str
    """`filter`, `layer`, `weight` or `dense`."""
    ratio: float
    """Share of the units that is removed; 0 for the dense network."""
    asked_ratio: float
    """Pruning ratio that was asked for, of the first run."""
    paths: tuple[Path, ...]
    accuracies: tuple[float, ...]
    """By run, 0 to 1."""
    mean: float
    half_width: float
    """Of the 95 % interval of the mean; not a number for one run."""
    start: str
    """`comparable.start_name`; empty for a pretraining."""
    budget: str
    """Start and recipe of the training in words: what alone may be ranked together."""
    images: int | None
    """Images, of all workers together, that the weights saw in pretraining and retraining; mean over the runs."""
    against_dense: float
    """Difference to the dense network that had the same start, recipe and seed, percentage points, mean over the runs; not a number
    where one was not trained."""
    against_dense_half_width: float
    dense_command: str
    """Trains a dense network that `against_dense` misses; empty where it misses none."""
    cost: Cost
    """Of finding the ticket, or of training the dense network; mean over the runs."""
    retraining: Cost
    """Of retraining it; nothing for the dense network."""
    energy: Energy | None
    """Of training or retraining the first of the runs."""
    measured: Measured
    """Of the first of the runs."""

    @property
    def density(self) -> float:
        """Share of the dense network's parameters."""
        return self.measured.size.parameters / self.measured.dense.parameters


@dataclass(frozen=True)
class _Entry:
    label: str
    kind: str
    ratio: float
    asked_ratio: float
    run: Run
    start: str
    start_images: int | None
    cost: Cost
    retraining: Cost
    recipe: str
    """All else that decides it, but for its seed."""

    @property
    def training(self) -> Cost:
        """Of the training that the run is."""
        return self.retraining if self.start else self.cost


@dataclass(frozen=True)
class Compared:
    contenders: Sequence[Contender]
    notes: Sequence[str]
    """What was passed over, and why."""


def compare(paths: Sequence[Path], settings: MeasureSettings, reading: Reading, device: str, world: World) -> Compared:
    """Group the runs by what found their ticket and by ratio, and measure the first of each group. Collective.

    A ticket stands for the runs that retrained it. Folders that are no run, and runs that are not finished, are passed over with a note.
    So are those of another network or data set than most have. Raises LoftError where nothing is left.
    """
    runs, notes = _runs_of(paths)
    entries, others = _alike([_entry(run) for run in runs])
    notes = [*notes, *others]
    groups: dict[tuple[str, str, float, str], list[_Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.label, entry.kind, entry.ratio, entry.recipe), []).append(entry)
    groups, dense = _told_apart(groups), DenseRuns()
    measured = measure([group[0].run.path for group in groups.values()], settings, reading, device, world)
    return Compared([_contender(group, one, dense) for group, one in zip(groups.values(), measured, strict=True)], notes)


def _runs_of(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs among `paths`, and those of the tickets among them; notes about the rest."""
    runs, notes = {}, []
    for path in paths:
        if not path.exists():
            raise LoftError(f"{path} is no folder: give runs, or tickets that were retrained")
        if (path / "ticket.json").is_file():
            found = _retrained(path)
            if not found:
                raise LoftError(f"{path} was not retrained yet: loft retrain {shlex.quote(str(path))}")
        elif (path / "run.json").is_file():
            found = [Run.open(path)]
        else:
            notes.append(f"{path} is passed over: it is no run")
            continue
        for run in found:
            if run.description.get("status") != "done":
                notes.append(f"{run.path} is passed over: it is not finished (status: {run.description.get('status')})")
            else:
                runs.setdefault(run.path.resolve(), run)
    if not runs:
        raise LoftError("; ".join(notes) + ": give finished runs of loft pretrain and loft retrain")
    return list(runs.values()), notes


def _retrained(path: Path) -> list[Run]:
    """The finished retrainings of a ticket, controls of its checks left out."""
    ticket, source = Ticket.read(path), pretrained_run({"path": str(path)})
    if source is None:
        raise LoftError(f"{path} does not lie in its run any more (RUN/tickets/NAME): give the runs that retrained it")
    descriptions = ((run, run.required("ticket", dict)) for run in retrainings_of(source))
    return [run for run, own in descriptions if own.get("sha256") in ticket.fingerprints and own.get("control") is None]


def _told_apart(groups: dict[tuple[str, str, float, str], list[_Entry]]) -> dict[tuple[str, str, float, str], list[_Entry]]:
    """Labels that several recipes share get a number, the first run's folder saying which it is."""
    recipes: dict[tuple[str, str], list[str]] = {}
    for label, kind, _, recipe in groups:
        known = recipes.setdefault((label, kind), [])
        if recipe not in known:
            known.append(recipe)
    made = {}
    for (label, kind, ratio, recipe), group in groups.items():
        known = recipes[label, kind]
        name = label if len(known) == 1 else f"{label} [recipe {known.index(recipe) + 1}: {group[0].run.path.name}]"
        made[name, kind, ratio, recipe] = [replace(entry, label=name) for entry in group]
    return made


def _recipe(run: Run, ticket: dict[str, Any] | None = None) -> str:
    """How a run was trained, and of a retraining what its ticket was drawn from: without seeds, ratio, and what decides nothing."""

    kind = RetrainSettings if ticket is not None else PretrainSettings
    recipe = deciding(from_json(kind, run.configuration))
    for name in ("seed", "evaluate_every", *deciding(Snapshots())):
        recipe.pop(name)
    kept = {name: (ticket or {}).get(name) for name in ("blocks", "floor", "control")}
    # early-bird chooses its snapshot itself, and imp its level
    searched = ticket is None or ticket.get("method") == "early-bird"
    if ticket is not None and ticket.get("control") == DENSE:  # whatever ticket it was retrained beside
        kept, searched = {"control": DENSE}, True
        recipe["start"] = start_of(run)
        recipe.pop("rewind")
    drawn_from = None if searched else re.sub(r"level-\d+", "level", str(ticket.get("drawn_from")))
    return to_json_text([recipe, kept, drawn_from, run.required("world_size", int)], sort_keys=True)


def _contender(group: Sequence[_Entry], measured: Measured, dense: DenseRuns) -> Contender:
    first = group[0]
    accuracies = tuple(entry.run.accuracy for entry in group)
    mean, half = mean_interval(accuracies)
    against, against_half, command = float("nan"), float("nan"), ""
    if first.kind != DENSE:
        counterparts = [dense.like(entry.run) for entry in group]
        missing = [entry for entry, other in zip(group, counterparts, strict=True) if other is None]
        if missing:
            command = dense_command(missing[0].run)
        else:
            pairs = zip(group, counterparts, strict=True)
            against, against_half = mean_interval([100 * (entry.run.accuracy - other.accuracy) for entry, other in pairs if other])
    images = None
    if all(entry.start_images is not None for entry in group):
        images = round(sum(entry.start_images + entry.training.samples for entry in group) / len(group))
    return Contender(
        first.label, first.kind, first.ratio, first.asked_ratio, tuple(entry.run.path for entry in group), accuracies, mean, half,
        first.start, _budget(first), images, against, against_half, command,
        _mean([entry.cost for entry in group]), _mean([entry.retraining for entry in group]), energy_of(first.run), measured,
    )  # fmt: skip


def _budget(entry: _Entry) -> str:
    """Start and training in words."""
    settings = from_json(RetrainSettings if entry.start else PretrainSettings, entry.run.configuration)
    ranks = entry.run.required("world_size", int)
    said = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)} at learning rate {settings.optimisation.lr:g}, {ranks} rank{'s' * (ranks > 1)}"
    return f"retrained from {start_text(entry.start)}, {said}" if entry.start else f"pretrained, {said}"


def _mean(costs: Sequence[Cost]) -> Cost:
    total = sum(costs, Cost())
    return Cost(**{field.name: getattr(total, field.name) / len(costs) for field in fields(Cost)})


def _entry(run: Run) -> _Entry:
    path, kind = run.path, run.description.get("kind")
    if kind == "pretrain":
        return _Entry(f"{DENSE} ({run.label})", DENSE, 0.0, 0.0, run, "", 0, cost_of(run), Cost(), _recipe(run))
    if kind != "retrain":
        raise LoftError(f"{path} is a {kind} run: give runs of loft retrain, and of loft pretrain for the dense networks")
    ticket = run.required("ticket", dict)
    asked = ticket.get("ratio")
    ratio = ticket.get("pruning_ratio", asked)  # older tickets say no more than what was asked
    shares = all(type(share) in (int, float) and 0 <= share < 1 for share in (ratio, asked))
    if not shares or not isinstance(ticket.get("method"), str):
        raise LoftError(f"{path / 'run.json'} does not say which ticket it retrained: restore it or retrain again")
    try:
        cost = Cost.from_json(ticket.get("cost"))
    except ValueError as problem:
        raise LoftError(f"{path / 'run.json'} is no retraining's ({problem}): restore it or retrain again") from None
    label, control, form = label_of(ticket), ticket.get("control"), str(ticket.get("kind", "filter"))
    if is_dense(run):
        source = pretrained_run(ticket)
        label, form, ratio, asked = f"{DENSE}{f' ({source.label})' if source else ''}, retrained", DENSE, 0.0, 0.0
    elif control is not None:
        label = f"{label}: {str(control)[:32]}"  # of loft check
    found_on = ticket["data"].get("dataset") if isinstance(ticket.get("data"), dict) else None
    if run.configuration.get("transfer") and found_on != run.required("data", dict).get("name"):
        label = f"{label}, found on {str(found_on)[:32]}"
    return _Entry(label, form, float(ratio), float(asked), run, start_of(run), start_images(run), cost, cost_of(run), _recipe(run, ticket))


def label_of(ticket: dict[str, Any]) -> str:
    """The method, and the options that are not its defaults, but for the seed."""
    method = ticket["method"]
    if method not in FINDERS:
        return method[:64]
    default = FINDERS[method].options()
    chosen = [
        f"{known.name.replace('_', '-')} {ticket[known.name]}"
        for known in fields(default)
        if known.name != "seed" and ticket.get(known.name, getattr(default, known.name)) != getattr(default, known.name)
        and known.name != "floor"
    ]  # fmt: skip
    return f"{method} ({', '.join(chosen)})" if chosen else method


def energy_of(run: Run) -> Energy | None:
    """Of all legs of a training, as its run.json has it; None where it does not say, or not of all: one that was killed left nothing."""
    legs = []
    for leg in run.description.get("legs") or []:
        fields_ = leg.get("energy") if isinstance(leg, dict) else None
        if not isinstance(fields_, dict):
            continue
        try:
            if any(type(fields_[name]) not in (int, float) for name in ("joules", "seconds")):
                return None
            legs.append(Energy(float(fields_["joules"]), float(fields_["seconds"]), str(fields_["source"]), bool(fields_["measured"])))
        except (KeyError, TypeError, ValueError):
            return None
    return one_after_another(legs) if len(legs) == 1 + len(run.description.get("resumed") or []) else None


def _alike(entries: Sequence[_Entry]) -> tuple[list[_Entry], list[str]]:
    """Those of the network and data that most of the runs have, and a note for each of the others: they are no comparison."""
    groups: dict[tuple, list[_Entry]] = {}
    for entry in entries:
        fingerprint = entry.run.required("data", dict).get("fingerprint")
        groups.setdefault((entry.run.dense_architecture, fingerprint), []).append(entry)
    (network, _), chosen = max(groups.items(), key=lambda group: len(group[1]))
    notes = []
    for other, left in groups.items():
        if left is not chosen:
            what = "comes from another network" if other[0] != network else "was trained on other images"
            notes += [f"{entry.run.path} is passed over: it {what} than {chosen[0].run.path}; compare it by itself" for entry in left]
    return chosen, notes


def to_fields(contender: Contender, intensity: float = WORLD_GRAMS_PER_KWH) -> dict[str, Any]:
    """For JSON and CSV: flat, units in the names; None for what was not measured. `intensity`: grams of CO2 for a kilowatt-hour."""
    measured, robustness = contender.measured, contender.measured.robustness
    energies = [None, None] if measured.energy is None else [one.joules_per_1000_images for one in measured.energy]
    return {
        "method": contender.label,
        "kind": contender.kind,
        "pruning_ratio": contender.ratio,
        "pruning_ratio_asked": contender.asked_ratio,
        "density": contender.density,
        "runs": len(contender.paths),
        "accuracy_mean": contender.mean,
        "accuracy_half_width": finite_or_none(contender.half_width),
        "start": contender.start or None,
        "budget": contender.budget,
        "training_images": contender.images,
        "against_dense_points": finite_or_none(contender.against_dense),
        "against_dense_half_width_points": finite_or_none(contender.against_dense_half_width),
        "dense_command": contender.dense_command or None,
        **{f"finding_{name}": value for name, value in asdict(contender.cost).items()},
        **{f"retraining_{name}": value for name, value in asdict(contender.retraining).items()},
        "training_joules": None if contender.energy is None else contender.energy.joules,
        "training_grams_co2": None if contender.energy is None else carbon_grams(contender.energy, intensity),
        "training_energy_measured": None if contender.energy is None else contender.energy.measured,
        "parameters": measured.size.parameters,
        "flops": measured.size.flops,
        "flops_share": measured.size.flops / measured.dense.flops,
        "training_memory_bytes": measured.footprint.training_bytes,
        "training_memory_share": measured.training_memory_share,
        "latency_median_seconds": measured.latency.median_seconds,
        "throughput_images_per_second": measured.latency.throughput,
        "speedup": measured.dense_latency.median_seconds / measured.latency.median_seconds,
        "speedup_low": measured.dense_latency.low_seconds / measured.latency.high_seconds,
        "speedup_high": measured.dense_latency.high_seconds / measured.latency.low_seconds,
        "joules_per_1000_images": energies[0],
        "energy_saved_share": None if energies[0] is None else 1 - energies[0] / energies[1],
        "grams_co2_per_million_images": None if measured.energy is None else grams_per_million(measured.energy[0], intensity),
        "energy_measured": None if measured.energy is None else measured.energy[0].energy.measured,
        **({} if robustness is None else {f"accuracy_{name}": value for name, value in robustness.attacks.items()}),
        "note": measured.note,
        "accuracy_corrupted": None if robustness is None or not robustness.corruptions else robustness.corrupted,
        **({} if robustness is None else {f"accuracy_on_{name.replace(' ', '_')}": value for name, value in robustness.shifted.items()}),
    }  # fmt: skip
