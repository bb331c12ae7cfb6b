"""From options to settings, a resumed run's own settings included."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from loft_hpc.errors import LoftError
from loft_hpc.jobs.settings import CHANGEABLE, flatten, from_json, option_of, with_leaves
from loft_hpc.runs.run import Run

Settings = TypeVar("Settings")


def for_run(given: Settings, kind: str, typed: set[str], path: Path | None, resume: bool, extend_to: int | None) -> Settings:
    """The settings to train with: those given, or with --resume those that the run has.

    What decides nothing of the result may be given anew; `extend_to` is the number of epochs that a finished run goes on to. Raises
    LoftError if one of the options that were `typed` contradicts the run, and where the run cannot be extended.
    """
    if extend_to is not None and not resume:
        raise LoftError("--extend-to continues a finished run: give --run and --resume with it", usage=True)
    if not resume:
        return given
    if path is None:
        raise LoftError("--resume needs --run: name the folder of the run to go on with", usage=True)
    if not (path / "run.json").exists():
        if extend_to is not None:
            raise LoftError(f"--extend-to continues a finished run, and {path} is none: omit the option to start one", usage=True)
        return given
    run = Run.open(path)
    if run.description.get("kind") != kind:
        raise LoftError(f"{path} is a {run.description.get('kind')} run: it cannot be resumed by loft {kind}")
    own = from_json(type(given), run.configuration)
    before, now = flatten(own), flatten(given)
    for name in sorted(typed & now.keys() - CHANGEABLE.keys()):
        if before[name] != now[name]:
            raise LoftError(f"{path} was started with {option_of(name)} {before[name]}: omit the option, or start another run")
    own = with_leaves(own, {name: now[name] for name in (typed & CHANGEABLE.keys()) | {"download"}})
    return own if extend_to is None else _extended(own, run, extend_to)


def _extended(settings: Settings, run: Run, epochs: int) -> Settings:
    """The settings of a finished run that goes on to `epochs`: at its constant rate, or through its schedule once more.

    A run that was extended to so many epochs already keeps its settings. Raises LoftError where the run cannot be extended.
    """
    if epochs == settings.epochs and settings.optimisation.restarts:
        return settings
    if getattr(settings, "rounds", None) is not None:
        raise LoftError(f"{run.path} was planned in rounds, and --extend-to counts epochs: start another run with more --rounds")
    if run.description.get("status") != "done":
        raise LoftError(f"{run.path} is not finished (status: {run.description.get('status')}): resume it without --extend-to first")
    if (run.description.get("results") or {}).get("stopped_early"):
        raise LoftError(f"{run.path} ended early, as its rankings were stable: start another run without --stop-when-stable")
    if epochs <= settings.epochs:
        raise LoftError(f"{run.path} has {settings.epochs} epochs already: give --extend-to a larger number", usage=True)
    drawn = [name for name in ("tickets", "searches", "sweeps") if any((run.path / name).glob("*"))]
    if drawn:
        others = " ".join(f"COPY/{name}" for name in drawn)
        raise LoftError(
            f"{run.path}/{drawn[0]} was made of its network as it is, which an extension replaces: copy the run "
            f"(cp -r {run.path} COPY && rm -r {others}) and extend the copy"
        )
    restarts = (*settings.optimisation.restarts, settings.epochs)
    return replace(settings, epochs=epochs, optimisation=replace(settings.optimisation, restarts=restarts))
