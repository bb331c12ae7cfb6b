"""Which retrainings may be compared: same start, same training. The dense network that had both is the one to set a ticket against."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loft_hpc.errors import LoftError
from loft_hpc.jobs.cost import cost_of
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import RetrainSettings, snapshot_name
from loft_hpc.jobs.settings import CHANGEABLE, deciding, flatten, from_json, option_of, to_json
from loft_hpc.jsontext import to_json_text
from loft_hpc.models.groups import parameters_of
from loft_hpc.runs.run import Run
from loft_hpc.runs.snapshots import point_of
from loft_hpc.tickets.masks import FilterMask
from loft_hpc.tickets.ticket import Cost, Ticket
from loft_hpc.training.settings import Snapshots

DENSE = "dense"
TRAINED, INITIAL, SEARCHED = "trained", "initial", "searched"
_LOOKING = ("seed", "rewind", "evaluate_every", *deciding(Snapshots()))
"""Fields of a retraining's settings that are no part of its recipe: `seed` and `rewind` are asked for by themselves."""


def start_name(ticket: Mapping[str, Any], rewind: str = "none") -> str:
    """Weights that a retraining starts from: `trained` (the pretrained network's), `initial`, a snapshot as `epoch:3`, or `searched`
    (those of a search of the ticket's own). `ticket`: its provenance."""
    if rewind != "none":
        point = point_of(snapshot_name(rewind, "--rewind"))
    else:
        file = Path(str(ticket.get("drawn_from", "model.safetensors")))
        if file.parts[0] == "searches":
            return SEARCHED
        if file.parts[0] != "snapshots":
            return TRAINED
        point = point_of(file.stem)
    return INITIAL if point == "epoch:0" else point


def start_text(start: str) -> str:
    """For people: `the initial weights`, `the weights of epoch:3`."""
    return f"the {start} weights" if start in (TRAINED, INITIAL, SEARCHED) else f"the weights of {start}"


def start_of(run: Run) -> str:
    """`start_name` of a retraining run."""
    return start_name(run.required("ticket", dict), str(run.configuration.get("rewind", "none")))


def start_images(run: Run) -> int | None:
    """Images, of all workers together, that a retraining's weights had seen before it; None where nothing says so."""
    ticket, start = run.required("ticket", dict), start_of(run)
    if start == INITIAL:
        return 0
    if start in (TRAINED, SEARCHED):
        return Cost.from_json(ticket.get("cost")).samples or None
    source = pretrained_run(ticket)
    return None if source is None else cost_of(source, source.snapshots.step(snapshot_name(start, "--rewind"))).samples


def recipe_of(run: Run) -> dict[str, Any]:
    """All that decides a retraining run, but for its ticket, start and seed."""
    recipe = deciding(from_json(RetrainSettings, run.configuration))
    return {name: value for name, value in recipe.items() if name not in _LOOKING} | {"world_size": run.required("world_size", int)}


def dense_ticket(run: Run) -> Ticket:
    """The dense network of a finished pretraining, to be retrained as its tickets are: a ticket that keeps everything, never on disk.

    Raises LoftError where `run` is none, or has not come to its end.
    """
    if run.description.get("kind") != "pretrain":
        raise LoftError(f"{run.path} is a {run.description.get('kind')} run: give --dense the run of loft pretrain")
    settings, state = settings_of(run), run.read_model()
    provenance = {
        "method": DENSE,
        "control": DENSE,
        "ratio": 0.0,
        "pruning_ratio": 0.0,
        "run": run.path.name,
        "drawn_from": str(run.model_path.relative_to(run.path)),
        "cost": asdict(cost_of(run)),
        "data": to_json(settings.data),
        "evaluation": to_json(settings.evaluation),
        "seed_of_run": settings.seed,
    }
    return Ticket(run.path / "tickets" / DENSE, FilterMask(run.architecture, {}), parameters_of(state), provenance)


def pretrained_run(ticket: Mapping[str, Any]) -> Run | None:
    """The run that a retrained ticket lies in, if it is still there. `ticket`: as a retraining run describes it."""
    try:
        return Run.open(Path(str(ticket.get("path"))).resolve().parent.parent)
    except (LoftError, OSError, ValueError, RuntimeError):
        return None


def retrainings_of(run: Run) -> Iterator[Run]:
    """Finished retrainings of a run's tickets and of its dense network: beside it, and those of its checks and sweeps."""
    home = run.path.resolve()
    beside, inside = home.parent.glob("*/run.json"), [*home.glob("sweeps/*/*/run.json"), *home.glob("tickets/*/checks/*/*/run.json")]
    for file in sorted([*beside, *inside]):
        try:
            found = Run.open(file.parent)
            ticket = found.description.get("ticket") or {}
            if found.description.get("status") != "done" or not isinstance(ticket.get("path"), str):
                continue
            if home in file.parents or Path(ticket["path"]).resolve().parent.parent == home:
                # whatever is missing of these raises, and a broken run is passed over
                _ = found.accuracy, start_of(found), recipe_of(found)
                yield found
        except (LoftError, OSError, ValueError, RuntimeError):
            continue


def is_dense(run: Run) -> bool:
    """Whether a retraining run's network was not pruned at all."""
    return (run.description.get("ticket") or {}).get("control") == DENSE


class DenseRuns:
    """Dense networks that were retrained, to set retrained tickets against."""

    def __init__(self) -> None:
        self._known: dict[Path, dict[tuple, Run]] = {}

    def like(self, run: Run) -> Run | None:
        """The dense network's retraining from the same start, by the same recipe and seed, on the same images as `run`; None if there is none."""
        source = pretrained_run(run.required("ticket", dict))
        if source is None:
            return None
        if source.path not in self._known:
            self._known[source.path] = {_likeness(other): other for other in retrainings_of(source) if is_dense(other)}
        return self._known[source.path].get(_likeness(run))


def _likeness(run: Run) -> tuple:
    recipe = to_json_text(recipe_of(run), sort_keys=True)
    return start_of(run), recipe, run.required("seed", int), run.required("data", dict).get("fingerprint")


def dense_command(run: Run) -> str:
    """The command that trains what `DenseRuns.like` misses; empty where none does."""
    source = pretrained_run(run.required("ticket", dict))
    settings, start = from_json(RetrainSettings, run.configuration), start_of(run)
    if source is None or start == SEARCHED:
        return ""
    rewind = {TRAINED: "none", INITIAL: "init"}.get(start, start)
    given = flatten(settings) | {"rewind": rewind}
    usual = flatten(RetrainSettings())
    left = {*CHANGEABLE, *flatten(settings.data), "transfer", "restarts", "evaluate_every", "snapshot_every", "snapshot_tensors"}
    options = [
        f"{option_of(name)} {item}" if not isinstance(item, bool) else option_of(name)
        for name, value in given.items()
        if name not in left and value != usual[name]
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    if settings.transfer:
        options.append(f"--dataset {settings.data.dataset}")
    if settings.data.data_dir != settings_of(source).data.data_dir:
        options.append(f"--data-dir {shlex.quote(settings.data.data_dir)}")
    ranks = run.required("world_size", int)
    launcher = f"mpirun -np {ranks} " if ranks > 1 else ""
    return " ".join([f"{launcher}loft retrain {shlex.quote(str(source.path))} --dense", *options])
