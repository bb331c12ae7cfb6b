"""What a command carries with it: the world, started when first asked for, and its way to the screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loft_hpc.comm.engines import AUTO
from loft_hpc.comm.launch import announced, announced_rank
from loft_hpc.jsontext import to_json_text
from loft_hpc.screen import tell, without_surrogates

if TYPE_CHECKING:
    from loft_hpc.comm.world import World
    from loft_hpc.training.interruption import Interruption


class Job:
    """The running command."""

    def __init__(self, interruption: Interruption) -> None:
        self.started_world: World | None = None
        self.engine = AUTO
        """What carries the collectives: a name of `loft_hpc.comm.engines`."""
        self.interruption = interruption
        """Whether the job was preempted; a training looks at it."""

    @property
    def world(self) -> World:
        """All ranks of this job; MPI and the engine start at the first use."""
        if self.started_world is None:
            from loft_hpc.comm.start import start

            self.started_world = start(self.engine)
        return self.started_world

    def join(self) -> None:
        """Start the world if a launcher started several of us, so that a failure of one rank from here on concerns all."""
        said = announced()
        if said and said[1] > 1:
            self.world  # noqa: B018 (starting it is the point)

    @property
    def speaks(self) -> bool:
        """Whether this rank prints: rank 0 alone does, also in a command that starts no MPI."""
        return (announced_rank() if self.started_world is None else self.started_world.rank) == 0

    def once(self, action: Callable[[], Any]) -> None:
        """Rank 0 does something, for instance draws a plot; if it fails, it fails on all ranks."""
        if self.started_world is not None:
            self.started_world.on_root(action)
        elif self.speaks:
            action()

    def say(self, text: str) -> None:
        if self.speaks:
            tell(text)

    def show(self, format: str, fields: dict[str, Any], text: str) -> None:
        """Results, as JSON with stable keys or as the text that a person reads. Raises LoftError where a number in the JSON is not finite."""
        self.say(to_json_text(without_surrogates(fields), indent=2) if format == "json" else text)


@dataclass(frozen=True)
class Report:
    """A table that can be printed in several ways: `header` and `rows` for people, `records` with units in their keys for programs."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()
    answers: Sequence[str] = ()
    """What a person wants to know, before the table."""

    def printed(self, format: str) -> str:
        """As `table`, `csv` (the records) or `latex` (a tabular of the table)."""
        if format == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(self.records[0]) if self.records else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records)
            return text.getvalue().rstrip("\n")
        if format == "latex":
            lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [self.header, *self.rows]]
            columns = "l" + "r" * (len(self.header) - 1)
            body = "\n".join([lines[0], r"\hline", *lines[1:]])
            return "\n".join(
                [rf"\begin{{tabular}}{{{columns}}}", body, r"\end{tabular}", *(f"% {line}" for line in [*self.answers, *self.notes])]
            )
        answers = [*self.answers, ""] if self.answers else []
        return "\n".join([*answers, table(self.header, self.rows), *self.notes])


def _latex(cell: str) -> str:
    return "".join("\\" + letter if letter in "%_&#$" else letter for letter in cell)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Aligned columns: those of `left` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        return "  ".join(cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in places).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


format_option = click.option(
    "--format", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How results are printed."
)
