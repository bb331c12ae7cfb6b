"""From options to settings, a resumed run's own settings included."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from loft_hpc.errors import LoftError
from loft_hpc.jobs.settings import flatten, from_json
from loft_hpc.runs.run import Run

Settings = TypeVar("Settings")


def for_run(given: Settings, kind: str, typed: set[str], path: Path | None, resume: bool) -> Settings:
    """The settings to train with: those given, or with --resume those that the run was started with.

    Raises LoftError if one of the options that were `typed` contradicts the run.
    """
    if not resume:
        return given
    if path is None:
        raise LoftError("--resume needs --run: name the folder of the run to go on with", usage=True)
    if not (path / "run.json").exists():
        return given
    run = Run.open(path)
    if run.description.get("kind") != kind:
        raise LoftError(f"{path} is a {run.description.get('kind')} run: it cannot be resumed by loft {kind}")
    own = from_json(type(given), run.configuration)
    own = replace(own, data=replace(own.data, download=given.data.download))
    before, now = flatten(own), flatten(given)
    for name in sorted(typed & now.keys()):
        if before[name] != now[name]:
            raise LoftError(
                f"{path} was started with --{name.replace('_', '-')} {before[name]}: leave the option away, or start another run"
            )
    return own
