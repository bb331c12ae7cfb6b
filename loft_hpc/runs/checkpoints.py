"""A run's checkpoints: complete states to resume from."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.errors import LoftError
from loft_hpc.files import publish_folder, read_json, read_tensors, write_json, write_tensors


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

    def any(self) -> bool:
        """Whether there is one, broken or not. Nothing is removed, unlike by `newest_step`."""
        return bool(self._complete())

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
            if not ledgers or progress.pop("step") != step or not _sensible(progress, step):
                raise ValueError
        except (KeyError, TypeError, AttributeError, ValueError):
            raise LoftError(f"{folder / 'progress.json'} is incomplete or not of this step") from None
        return Checkpoint(step, read_tensors(folder / "state.safetensors"), ledgers, progress)

    def forget_after(self, step: int) -> None:
        """Remove those of later steps, which a run that goes on writes again: broken ones would count among those that are kept."""
        for folder in self._complete():
            if int(folder.name) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        found = [folder for folder in self._folder.glob("*") if re.fullmatch(r"[0-9]{6,9}", folder.name) and folder.is_dir()]
        return sorted(found, key=lambda folder: int(folder.name))


def _sensible(progress: dict, step: int) -> bool:
    """Whether the counters are such as a training of so many steps leaves."""
    so_far = progress.get("epoch_so_far", {"first_step": step, "losses": [0.0], "exchange_seconds": 0.0, "seconds": 0.0})
    numbers = [progress.get("wall_seconds", 0.0), so_far["exchange_seconds"], so_far["seconds"], *so_far["losses"]]
    counts = [progress.get("round", 0), so_far["first_step"], *progress.get("interrupted_at_steps", [])]
    return (
        bool(so_far["losses"])
        and all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers)
        and all(type(count) is int and 0 <= count <= step for count in counts)
    )
