"""What people read: text that any terminal can show, and streams that outlive whoever reads them."""

import io
import os
import select
import sys
from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    """The text with all that could move a terminal's cursor, or that is no character, spelt out: names come from other people's files."""
    return "".join(letter if letter == "\n" or letter.isprintable() else _spelt(letter) for letter in text)


def without_surrogates(value: Any) -> Any:
    """A value for JSON in which bytes of a file's name that are no UTF-8 are spelt out: half a surrogate pair is no JSON to most readers."""
    if isinstance(value, str):
        return "".join(_spelt(letter) if "\ud800" <= letter <= "\udfff" else letter for letter in value)
    if isinstance(value, Mapping):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(item) for item in value]
    return value


def _spelt(letter: str) -> str:
    """Bytes of a file's name that are no UTF-8 as the bytes that they are (Python holds them as U+DC80 to U+DCFF)."""
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]


def tell(text: str, error: bool = False) -> None:
    """A line on standard output, or on standard error; what the stream's encoding does not know is spelt out."""
    write(printable(text) + "\n", error)


def erase_line() -> None:
    """Clear the terminal's line."""
    write("\r\033[K")


def write(text: str, error: bool = False) -> None:
    """Text as it is, at once. With `tell` and `erase_line`, all writing to the screen of this program; a closed stream takes nothing."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


class LastingOutput(io.FileIO):
    """A file descriptor that is written to as long as somebody takes it. After the first failure everything is dropped."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.problem: OSError | None = None
        """What ended the writing: a reader that is gone (EPIPE), a full disk, a terminal that was closed."""

    def write(self, data: Any) -> int:
        try:
            while self.problem is None and (written := super().write(data)) is None:  # somebody made the pipe non-blocking, and it is full
                select.select([], [self], [])
        except OSError as problem:
            self.problem = problem
        return memoryview(data).nbytes if self.problem else written


def outlive_readers() -> LastingOutput:
    """Make standard output and standard error of this process such that writing to them never fails; returns what lies below the output.

    Descriptors that are closed are opened on /dev/null: a file that is opened later would take the number, and be written into by whatever
    writes to the screen.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    output = LastingOutput(1)
    sys.stdout, sys.stderr = _text(output, sys.stdout), _text(LastingOutput(2), sys.stderr)
    return output


def _text(raw: LastingOutput, before: Any) -> io.TextIOWrapper:
    """A text stream as Python had made it."""
    encoding, at_once = (before.encoding, before.line_buffering) if before else ("utf-8", True)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=at_once)
