"""Progress of a training: a bar where somebody watches, else a line per epoch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from loft_hpc.comm.launch import output_is_terminal
from loft_hpc.screen import erase_line, tell

if TYPE_CHECKING:
    from loft_hpc.comm.world import World


def ranks_text(world: World) -> str:
    """How many ranks there are, and what carries data between them."""
    return "1 rank" if world.size == 1 else f"{world.size} ranks ({world.engine})"


class Progress:
    """Tells what the session reports, on rank 0."""

    def __init__(self, speaks: bool, title: str = ""):
        """`title`: what is trained, for the first line."""
        self._speaks, self._title = speaks, title
        self._bar: Any = None
        self._done = 0
        self.notes: list[str] = []
        """What `noted` was told, for JSON."""

    def prepared(self, epoch_images: int) -> None:
        if self._speaks:
            tell(f"{self._title}; an epoch is {epoch_images:,} images of all ranks together")

    def started(self, path: str, total_steps: int, done_steps: int) -> None:
        self._done = done_steps
        if self._speaks:
            tell(f"run: {path}")
        if done_steps and self._speaks:
            tell(f"going on at step {done_steps} of {total_steps}")
        if self._speaks and output_is_terminal():
            self._bar = click.progressbar(length=total_steps, label="training", item_show_func=lambda text: text, file=sys.stdout)
            self._bar.update(done_steps)

    def advanced(self, step: int, loss: float) -> None:
        if self._bar:
            self._bar.update(step - self._done, f"loss {loss:.3f}")
        self._done = step

    def epoch_ended(self, epoch: int, epochs: int, loss: float, score: Any, distance: float | None, seconds: float) -> None:
        if not self._speaks:
            return
        judged = f"   test accuracy {100 * score.accuracy:6.2f} %" if score else ""
        moved = f"   filter distance {distance:.3f}" if distance is not None else ""
        line = f"epoch {epoch:>{len(str(epochs))}}/{epochs}   loss {loss:7.4f}{judged}{moved}   {seconds:6.1f} s"
        if self._bar:
            erase_line()  # the bar gives way to the line and is drawn again below it
        tell(line)
        if self._bar:
            if epoch < epochs:
                self._bar.render_progress()
            else:
                self._bar.render_finish()

    def other_world_size(self, before: int, now: int) -> None:
        if self._speaks:
            tell(f"this run had {before} ranks and has {now} now: partitions, data order and rounding differ from here on")

    def fell_back(self, problem: str) -> None:
        tell(f"loft: note: the newest checkpoint is broken, an earlier one is used: {problem}", error=True)

    def noted(self, text: str) -> None:
        self.notes.append(text)
        if self._speaks:
            tell(f"note: {text}")

    def stopped(self, epoch: float, epochs: int) -> None:
        if self._bar:
            self._bar.render_finish()
        if self._speaks:
            tell(f"the filters' rankings are stable: stopped after {epoch:g} of {epochs} epochs")
