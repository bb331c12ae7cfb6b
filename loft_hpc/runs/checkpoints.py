"""A run's checkpoints: complete states to resume from."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.errors import LoftError
from loft_hpc.runs.files import publish_folder, read_json, read_tensors, write_json, write_tensors


@dataclass(frozen=True)
class Checkpoint:
    """Everything that decides the rest of a run. (Data order and deals are functions of seed, rank and step.)"""

    step: int
    """Local steps done."""
    tensors: dict[str, Tensor]
    ledgers: list[Ledger]
    """By rank."""
    progress: dict
    """Counters of the strategy, for instance the round."""


class Checkpoints:
    """RUN/checkpoints: one folder for each, named by its step."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, checkpoint: Checkpoint, keep: int) -> None:
        """checkpoints/NNNNNN, complete or not there at all; of all only the newest `keep` stay."""
        temporary = self._folder / f".{checkpoint.step:06d}.{os.getpid()}"
        write_tensors(temporary / "state.safetensors", checkpoint.tensors)
        progress = {"step": checkpoint.step, "ledgers": [ledger.to_json() for ledger in checkpoint.ledgers], **checkpoint.progress}
        write_json(temporary / "progress.json", progress)
        final = self._folder / f"{checkpoint.step:06d}"
        if final.exists():
            shutil.rmtree(final)
        publish_folder(temporary, final)
        for old in self._complete()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # a network file system may keep a file that somebody still reads

    def newest_step(self, fell_back: Callable[[str], None]) -> int | None:
        """Step of the newest checkpoint that is whole; None for a run that was ended before its first.

        `fell_back` is told of newer ones that are broken. Raises LoftError if all are. What a killed writer left half done is removed.
        """
        for leftover in self._folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        problem = None
        for folder in reversed(self._complete()):
            try:
                step = self.read(int(folder.name)).step
            except LoftError as error:
                problem = problem or error
            else:
                if problem:
                    fell_back(str(problem))
                return step
        if problem:
            raise LoftError(f"nothing to resume from: {problem}")
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises LoftError where it is missing or broken."""
        folder = self._folder / f"{step:06d}"
        progress = read_json(folder / "progress.json")
        try:
            ledgers = [Ledger.from_json(fields) for fields in progress.pop("ledgers")]
            written = int(progress.pop("step"))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise LoftError(f"{folder / 'progress.json'} is incomplete") from None
        return Checkpoint(written, read_tensors(folder / "state.safetensors"), ledgers, progress)

    def _complete(self) -> list[Path]:
        found = [folder for folder in self._folder.glob("*") if folder.name.isdigit() and folder.is_dir()]
        return sorted(found, key=lambda folder: int(folder.name))
