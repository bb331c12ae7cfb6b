"""`loft compare`: retrained tickets side by side, whatever found them."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loft_hpc.analysis.energy import WORLD_GRAMS_PER_KWH, Energy, carbon_grams, grams_per_million, one_after_another
from loft_hpc.analysis.statistics import mean_interval
from loft_hpc.comm.world import World
from loft_hpc.data.registry import Reading
from loft_hpc.errors import LoftError
from loft_hpc.jobs.cost import cost_of
from loft_hpc.jobs.measure import Measured, MeasureSettings, measure
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.settings import deciding, from_json
from loft_hpc.jsontext import finite_or_none, to_json_text
from loft_hpc.runs.run import Run
from loft_hpc.tickets import finders  # noqa: F401 (finders register themselves)
from loft_hpc.tickets.pruning import FINDERS
from loft_hpc.tickets.ticket import Cost
from loft_hpc.training.settings import Snapshots

DENSE = "dense"


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
    against_dense: float
    """Difference to the dense network that each was drawn from, percentage points, meaned over the runs; not a number where one is gone."""
    against_dense_half_width: float
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
    dense_accuracy: float
    cost: Cost
    retraining: Cost
    recipe: str
    """All else that decides it, but for its seed."""


def compare(paths: Sequence[Path], settings: MeasureSettings, reading: Reading, device: str, world: World) -> list[Contender]:
    """Group the runs by what found their ticket and by ratio, and measure the first of each group. Collective.

    Raises LoftError for what is no finished run of one data set and network.
    """
    entries = [_entry(path) for path in paths]
    _refuse_mixture(entries)
    groups: dict[tuple[str, str, float, str], list[_Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.label, entry.kind, entry.ratio, entry.recipe), []).append(entry)
    groups = _told_apart(groups)
    measured = measure([group[0].run.path for group in groups.values()], settings, reading, device, world)
    return [_contender(group, one) for group, one in zip(groups.values(), measured, strict=True)]


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
    drawn_from = None if searched else re.sub(r"level-\d+", "level", str(ticket.get("drawn_from")))
    return to_json_text([recipe, kept, drawn_from, run.required("world_size", int)], sort_keys=True)


def _contender(group: Sequence[_Entry], measured: Measured) -> Contender:
    first = group[0]
    accuracies = tuple(entry.run.accuracy for entry in group)
    mean, half = mean_interval(accuracies)
    against, against_half = mean_interval([100 * (entry.run.accuracy - entry.dense_accuracy) for entry in group])
    return Contender(
        first.label, first.kind, first.ratio, first.asked_ratio, tuple(entry.run.path for entry in group), accuracies, mean, half, against, against_half,
        _mean([entry.cost for entry in group]), _mean([entry.retraining for entry in group]), energy_of(first.run), measured,
    )  # fmt: skip


def _mean(costs: Sequence[Cost]) -> Cost:
    total = sum(costs, Cost())
    return Cost(**{field.name: getattr(total, field.name) / len(costs) for field in fields(Cost)})


def _entry(path: Path) -> _Entry:
    if (path / "ticket.json").is_file():
        raise LoftError(f"{path} is a ticket, which has no accuracy before it is retrained: give the run of loft retrain")
    run = Run.open(path)
    kind = run.description.get("kind")
    if kind == "pretrain":
        accuracy = run.accuracy
        return _Entry(f"{DENSE} ({run.label})", DENSE, 0.0, 0.0, run, accuracy, cost_of(run), Cost(), _recipe(run))
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
    label, control = label_of(ticket), ticket.get("control")
    if control is not None:
        label = f"{label}: {str(control)[:32]}"  # of loft check
    found_on = ticket["data"].get("dataset") if isinstance(ticket.get("data"), dict) else None
    if run.configuration.get("transfer") and found_on != run.required("data", dict).get("name"):
        label = f"{label}, found on {str(found_on)[:32]}"
    accuracy = _dense_accuracy(run, ticket)
    return _Entry(
        label, str(ticket.get("kind", "filter")), float(ratio), float(asked), run, accuracy, cost, cost_of(run), _recipe(run, ticket)
    )


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


def _dense_accuracy(run: Run, ticket: dict[str, Any]) -> float:
    """Of the run that the ticket lies in, where it is still there and was trained on the images that `run` retrained the ticket on."""
    try:
        dense = Run.open(Path(str(ticket.get("path"))).resolve().parent.parent)
        same = (dense.description.get("data") or {}).get("fingerprint") == run.required("data", dict).get("fingerprint")
        return dense.accuracy if same else float("nan")
    except (LoftError, OSError, ValueError, RuntimeError):
        return float("nan")


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


def _refuse_mixture(entries: Sequence[_Entry]) -> None:
    """Raises LoftError unless all come from one network and data set: anything else is no comparison."""
    first = entries[0].run
    for entry in entries[1:]:
        if entry.run.dense_architecture != first.dense_architecture:
            raise LoftError(f"{entry.run.path} comes from another network than {first.path}: compare tickets of one network")
        if entry.run.required("data", dict).get("fingerprint") != first.required("data", dict).get("fingerprint"):
            raise LoftError(f"{entry.run.path} was trained on other images than {first.path}: compare tickets of one data set")


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
        "against_dense_points": finite_or_none(contender.against_dense),
        "against_dense_half_width_points": finite_or_none(contender.against_dense_half_width),
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
        "joules_per_1000_images": energies[0],
        "energy_saved_share": None if energies[0] is None else 1 - energies[0] / energies[1],
        "grams_co2_per_million_images": None if measured.energy is None else grams_per_million(measured.energy[0], intensity),
        "energy_measured": None if measured.energy is None else measured.energy[0].energy.measured,
        **({} if robustness is None else {f"accuracy_{name}": value for name, value in robustness.attacks.items()}),
        "note": measured.note,
        "accuracy_corrupted": None if robustness is None or not robustness.corruptions else robustness.corrupted,
        **({} if robustness is None else {f"accuracy_on_{name.replace(' ', '_')}": value for name, value in robustness.shifted.items()}),
    }  # fmt: skip
