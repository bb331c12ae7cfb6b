"""A run on disk: its description, final network and logs; with `snapshots` and `checkpoints`, the only writers of files (docs/file-formats.md)."""

import itertools
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

import loft_hpc
from loft_hpc.comm.ledger import Ledger
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.files import read_json, read_tensors, refuse_links_outside, write_json, write_tensors
from loft_hpc.models.architecture import Architecture
from loft_hpc.packages import installed_versions
from loft_hpc.runs import lock
from loft_hpc.runs.checkpoints import Checkpoints
from loft_hpc.runs.log import MAX_STEPS, EventLog
from loft_hpc.runs.snapshots import Snapshots

Value = TypeVar("Value")
_PACKAGES = ("torch", "torchvision", "horovod", "mpi4py", "numpy")
_KINDS = {"kind": str, "status": str, "data": dict, "ticket": dict, "hidden_widths": dict, "dense_architecture": dict, "results": dict,
          "search": dict, "engine": str, "weights": dict, "resumed": list, "legs": list, "supervision": dict}  # fmt: skip
"""What else run.json says, where it says it."""
_COUNTS = ("total_steps", "steps_per_epoch", "world_size")


def claim_default_path(model: str, dataset: str, strategy: str, workers: int) -> Path:
    """An empty folder runs/MODEL-DATASET-STRATEGY+WORKERS-TIME, with a number behind it where two runs start in one second."""
    base = Path("runs") / f"{model}-{dataset}-{strategy}+{workers}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


class Run:
    """A run's folder. Reading is for every rank, writing for rank 0 (the callers see to that)."""

    def __init__(self, path: Path, description: dict):
        self.path = path
        self.description = description

    # -- making and opening -----------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, kind: str, configuration: Mapping[str, Any], details: Mapping[str, Any]) -> "Run":
        """A new run's folder with its run.json. Raises LoftError if the folder holds anything already."""
        refuse_occupied(path)
        description = {
            "kind": kind,
            "command": sys.argv,
            "configuration": dict(configuration),
            **details,
            "versions": {"loft-hpc": loft_hpc.__version__, "python": platform.python_version(), **installed_versions(_PACKAGES)},
            "host": platform.node(),
            "started": _now(),
            "ended": None,
            "status": "running",
        }
        write_json(path / "run.json", description)
        return cls(path, description)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run. Raises LoftError where `path` is none."""
        if not (path / "run.json").is_file():
            hint = (
                "it holds a ticket, not a run"
                if (path / "ticket.json").is_file()
                else "no run.json in it"
                if path.is_dir()
                else "no such folder"
            )
            raise LoftError(f"{path} is no run ({hint}): give the folder that `loft pretrain` printed")
        description = read_json(path / "run.json")
        if not isinstance(description.get("configuration"), dict) or not isinstance(description.get("architecture"), dict):
            raise LoftError(f"{path / 'run.json'} describes no run: restore it or make the run anew")
        strange = [name for name, kind in _KINDS.items() if not isinstance(description.get(name), kind | None)]
        strange += [name for name in _COUNTS if name in description and not _is_count(description[name])]
        if strange:
            raise LoftError(f"{path / 'run.json'} says no sensible {strange[0]}: restore it or make the run anew")
        return cls(path, description)

    @classmethod
    def open_to_write(cls, path: Path) -> "Run":
        """An existing run that will be added to. Raises LoftError also where what is written would land outside of it."""
        run = cls.open(path)
        refuse_links_outside(path)
        return run

    def resume(
        self,
        step: int,
        configuration: Mapping[str, Any],
        details: Mapping[str, Any],
        changed: Mapping[str, Any],
        supervision: Mapping[str, Any],
    ) -> None:
        """Mark the run as going on after `step`, and record what this attempt does otherwise than the one before it.

        A finished run that goes on is unfinished again: its results move into the record of this attempt, its last network stays in
        RUN/snapshots.
        """
        for name in ("failure", "interrupted_at_step"):
            self.description.pop(name, None)
        finished = self.description.get("status") == "done"
        attempt = {
            "at": _now(),
            "step": step,
            "ranks_before": self.description.get("world_size"),
            "world_size": details["world_size"],
            "host": platform.node(),
            "changed": dict(changed),
            **({"results_before": self.description.pop("results", None)} if finished else {}),
        }
        own = {name: details[name] for name in ("world_size", "engine", "placement", "total_steps")}
        self._update(
            status="running", ended=None, resumed=[*(self.description.get("resumed") or []), attempt],
            configuration=dict(configuration), supervision=dict(supervision), **own,
        )  # fmt: skip
        if finished:
            for name in ("model.safetensors", "ledger.json"):
                (self.path / name).unlink(missing_ok=True)

    def interrupt(self, step: int) -> None:
        """Record that the run was preempted, with a checkpoint after `step` to go on from."""
        self._update(status="interrupted", ended=_now(), interrupted_at_step=step)

    def finish(self, status: str, results: Mapping[str, Any] | None = None) -> None:
        """Record how the run ended: `done` or `failed`. Success is said here, not by mpirun's exit code alone."""
        self._update(status=status, ended=_now(), results=dict(results or {}))

    def add_leg(self, leg: Mapping[str, Any]) -> None:
        """Record what a leg of the training took: one entry for each time that it was begun or gone on with."""
        self._update(legs=[*(self.description.get("legs") or []), dict(leg)])

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Write the status `failed` and the reason into run.json if what happens inside fails."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as problem:
            self._update(status="failed", ended=_now(), failure=(str(problem).splitlines() or [type(problem).__name__])[0])
            raise

    def _update(self, **fields: Any) -> None:
        description = self.description | fields
        write_json(self.path / "run.json", description)
        self.description = description  # not before: what cannot be written must not stand in the way of saying so

    # -- what a run says about itself -------------------------------------------------------------------------------------

    @property
    def configuration(self) -> dict:
        return self.description["configuration"]

    def required(self, name: str, kind: type[Value]) -> Value:
        """An entry of run.json. Raises LoftError where it is missing or of another kind."""
        value = self.description.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LoftError(f"{self.path / 'run.json'} does not say its {name}: restore it or make the run anew")
        return value

    @property
    def label(self) -> str:
        """Strategy and workers, for instance loft+4; retrain+2 for a retraining run."""
        how = self.configuration.get("strategy", self.description.get("kind"))
        if not isinstance(how, str) or not re.fullmatch(r"[a-z-]{1,32}", how):
            raise LoftError(f"{self.path / 'run.json'} does not say its strategy: restore it or make the run anew")
        return f"{how}+{self.required('world_size', int)}"

    @property
    def other_sizes(self) -> bool:
        """Whether it went on with another number of ranks than it had before."""
        legs = self.description.get("resumed") or []
        return any(isinstance(leg, dict) and leg.get("ranks_before", leg.get("world_size")) != leg.get("world_size") for leg in legs)

    @property
    def attempts(self) -> list[tuple[int, dict[str, Any]]]:
        """(first step, what was changed before it, by setting) of each time that the run was resumed and says so."""
        found = [attempt for attempt in self.description.get("resumed") or [] if isinstance(attempt, dict)]
        return [
            (attempt["step"], attempt["changed"])
            for attempt in found
            if type(attempt.get("step")) is int and attempt["step"] >= 0 and isinstance(attempt.get("changed"), dict)
        ]

    @property
    def interrupted_at_steps(self) -> list[int]:
        """Steps after which a finished run wrote a checkpoint because it was preempted."""
        steps = (self.description.get("results") or {}).get("interrupted_at_steps", [])
        return [step for step in steps if type(step) is int] if isinstance(steps, list) else []

    @property
    def accuracy(self) -> float:
        """Of the final network, 0 to 1. Raises LoftError for a run that has not come to its end."""
        accuracy = self.required("results", dict).get("accuracy")
        if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
            raise LoftError(f"{self.path} has no accuracy yet (status: {self.description.get('status')}): finish it with --resume first")
        return accuracy

    @property
    def architecture(self) -> Architecture:
        return Architecture.from_json(self.description["architecture"])

    @property
    def dense_architecture(self) -> Architecture:
        """Of the network that a retrained ticket is one of; its own where it says no other."""
        dense = self.description.get("dense_architecture")
        return self.architecture if dense is None else Architecture.from_json(dense)

    @property
    def hidden_widths(self) -> dict[str, int] | None:
        """Hidden widths of a run that retrained a ticket; None for the full network. Raises LoftError where its blocks have no such widths."""
        widths = self.description.get("hidden_widths")
        if widths is None:
            return None
        most = self.architecture.hidden_widths()
        if widths.keys() != most.keys() or any(type(width) is not int or not 1 <= width <= most[name] for name, width in widths.items()):
            raise LoftError(f"{self.path / 'run.json'} has hidden_widths that do not fit its network: restore it or make the run anew")
        return widths

    # -- tensors ----------------------------------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path:
        return self.path / "model.safetensors"

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        write_tensors(self.model_path, state)

    def read_model(self) -> dict[str, Tensor]:
        """The final network. Raises LoftError for a run that has not come to its end."""
        if not self.model_path.exists():
            raise LoftError(f"{self.path} has no final model (status: {self.description.get('status')}): finish it with --resume first")
        return read_tensors(self.model_path)

    @property
    def snapshots(self) -> Snapshots:
        return Snapshots(self)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints")

    def sweep_path(self, name: str) -> Path:
        return self.path / "sweeps" / name / "sweep.json"

    def write_sweep(self, name: str, fields: Mapping[str, Any]) -> None:
        """How the tickets of a sweep are retrained."""
        write_json(self.sweep_path(name), fields)

    # -- logs -------------------------------------------------------------------------------------------------------------

    @property
    def _log(self) -> EventLog:
        return EventLog(self.path / "metrics.jsonl")

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        self._log.append({"event": event, **fields})

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl about one kind of event, whole ones alone. Each says its step."""
        return [event for _, event in self._log.lines() if event.get("event") == kind]

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after `step`, which a resumed run does again: lines of metrics.jsonl, scores and checkpoints."""
        self.snapshots.forget_after(step)
        self.checkpoints.forget_after(step)
        self._log.forget_after(step)

    def write_ledger(self, ledgers: list[Ledger]) -> None:
        """ledger.json: the ranks' ledgers and their sum."""
        total = Ledger()
        for ledger in ledgers:
            total.add(ledger)
        write_json(
            self.path / "ledger.json", {"unit": "bytes", "total": total.to_json(), "ranks": [ledger.to_json() for ledger in ledgers]}
        )

    def read_ledgers(self) -> list[Ledger]:
        """The ranks' ledgers, by rank. Raises LoftError where ledger.json is missing, as before a run's end, or no ledger."""
        if self.description.get("status") != "done" and not (self.path / "ledger.json").exists():
            raise LoftError(f"{self.path} has no ledger yet (status: {self.description.get('status')}): finish it with --resume first")
        try:
            return [Ledger.from_json(fields) for fields in read_json(self.path / "ledger.json")["ranks"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise LoftError(f"{self.path / 'ledger.json'} is no ledger: restore it or make the run anew") from None


def refuse_occupied(path: Path) -> None:
    """Raises LoftError if a new run cannot be made at `path`, because something is there."""
    if path.exists() and (not path.is_dir() or any(entry.name != lock.NAME for entry in path.iterdir())):
        raise LoftError(f"{path} exists already and is never overwritten: name another --run, or go on with it by --resume")


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_STEPS


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
