"""The list of images that a training leaves out: a text file with one name a line, as `loft doctor --every-image` writes it.

A name is that of the index, train/CLASS/IMAGE. One that holds a line break, or is no text, stands there as a JSON string.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from loft_hpc.data.catalogue import SPLITS
from loft_hpc.errors import LoftError
from loft_hpc.files import open_plain
from loft_hpc.jsontext import from_json_text, to_json_text

LIST_BYTES = 1 << 20
"""No list is larger: it stands in run.json, and a data set with more broken images needs mending."""


def to_line(name: str) -> str:
    """A name as it stands in a list, printable."""
    return name if name.isprintable() else to_json_text(name)


def to_text(names: Iterable[str]) -> str:
    return "".join(f"{to_line(name)}\n" for name in sorted(set(names)))


def read_list(path: Path) -> tuple[str, ...]:
    """The names in a list, sorted, each once. Raises LoftError where it is no such list."""
    try:
        with open_plain(path) as file:
            content = file.read(LIST_BYTES + 1)
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError)
        raise LoftError(f"the list {path} cannot be read ({problem.strerror}): name a file with one image a line", usage=missing) from None
    if len(content) > LIST_BYTES:
        raise LoftError(f"the list {path} has more than {LIST_BYTES:,} bytes: with so many broken images, restore the data set")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return tuple(sorted({_name(path, number, os.fsdecode(line)) for number, line in enumerate(lines, start=1) if line.strip()}))


def _name(path: Path, number: int, line: str) -> str:
    name: object = line.removesuffix("\r")
    if line.startswith('"'):
        try:
            name = from_json_text(line)
        except ValueError:
            name = None
    if not isinstance(name, str) or not name.startswith(tuple(f"{split}/" for split in SPLITS)):
        raise LoftError(
            f"line {number} of the list {path} is {line[:100]!r}: name images as loft doctor does, train/CLASS/IMAGE or val/CLASS/IMAGE"
        )
    return name
