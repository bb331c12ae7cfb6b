"""A run's snapshots: what the filters were ranked by over time, and the full networks to draw tickets from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors, write_tensors
from loft_hpc.models.scores import CRITERIA, Scores

if TYPE_CHECKING:
    from loft_hpc.runs.run import Run

_SCORES = "scores-"


class Snapshots:
    """RUN/snapshots (docs/file-formats.md). Other files there are passed over."""

    def __init__(self, run: Run):
        self._run = run
        self._folder = run.path / "snapshots"

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def write(self, name: str, state: Mapping[str, Tensor]) -> None:
        write_tensors(self.path(name), state)

    def read(self, name: str) -> dict[str, Tensor]:
        """The full network of a snapshot, for instance `epoch-003`. Raises LoftError where there is none."""
        if not self.path(name).exists():
            there = ", ".join(point_of(other) for other in self.names()) or "none"
            raise LoftError(f"{self._run.path} has no snapshot {point_of(name)} with the full network: there are {there}")
        return read_tensors(self.path(name))

    def names(self) -> list[str]:
        """Of the snapshots that hold the full network, in the order in which they were taken."""
        found = [file.stem for file in self._folder.glob("*.safetensors") if re.fullmatch(r"(epoch|step)-\d{1,9}", file.stem)]
        return sorted(found, key=self.step)

    def name(self, step: int) -> str:
        """What a snapshot after so many steps is called: `epoch-NNN` for the epochs done, a last one that is not whole counting.

        `step-NNNNNN` where snapshots are counted in steps, but for the first and the last.
        """
        total, per_epoch = self._run.required("total_steps", int), self._run.required("steps_per_epoch", int)
        snapshots = self._run.configuration.get("snapshots")
        in_steps = isinstance(snapshots, dict) and str(snapshots.get("snapshot_every")).endswith("it")
        if in_steps and 0 < step < total:
            return f"step-{step:06d}"
        return f"epoch-{math.ceil(step / per_epoch) if step >= total else step // per_epoch:03d}"

    def step(self, name: str) -> int:
        """The step after which a snapshot was taken.

        Where no scores tell (runs of earlier versions), an epoch's end, which under LoFT may be up to a round early.
        """
        for step in self.score_steps():
            if self.name(step) == name:
                return step
        unit, number = name.split("-")
        return int(number) * (1 if unit == "step" else self._run.required("steps_per_epoch", int))

    def write_scores(self, step: int, scores: Mapping[str, Tensor]) -> None:
        write_tensors(self._folder / f"{_SCORES}{step:06d}.safetensors", scores)

    def read_scores(self, step: int) -> dict[str, Tensor]:
        """Raises LoftError where they are not those of this run's filters."""
        path = self._folder / f"{_SCORES}{step:06d}.safetensors"
        scores = read_tensors(path)
        self.check_scores(scores, path)
        return scores

    def check_scores(self, scores: Scores, path: Path) -> None:
        """Raises LoftError, naming the file, unless these are scores of all of this run's filters."""
        widths = self._run.hidden_widths or self._run.architecture.hidden_widths()
        expected = {f"{criterion}/{name}": (width,) for criterion in CRITERIA for name, width in widths.items()}
        if {name: tuple(tensor.shape) for name, tensor in scores.items()} != expected or any(
            tensor.dtype != torch.float32 for tensor in scores.values()
        ):
            raise LoftError(f"{path} does not hold the scores of this network's filters: restore it, or remove it")

    def score_steps(self) -> list[int]:
        """The steps after which the filters' scores were recorded."""
        names = [file.stem.removeprefix(_SCORES) for file in self._folder.glob(f"{_SCORES}*.safetensors")]
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,9}", name))

    def forget_after(self, step: int) -> None:
        """Remove scores that were recorded after `step`, which a resumed run records again."""
        for later in self.score_steps():
            if later > step:
                (self._folder / f"{_SCORES}{later:06d}.safetensors").unlink()


def point_of(snapshot: str) -> str:
    """A snapshot's name as commands take it: epoch:3 for epoch-003."""
    unit, number = snapshot.split("-")
    return f"{unit}:{int(number)}"
