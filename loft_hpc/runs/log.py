"""A run's log: a line of JSON for each event, of which each says its step."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loft_hpc.errors import LoftError
from loft_hpc.files import open_plain, write_atomically
from loft_hpc.jsontext import from_json_text, to_json_text

MAX_STEPS = 10**9
_LINE_BYTES = 1 << 20
"""No line is longer."""


class EventLog:
    """metrics.jsonl."""

    def __init__(self, path: Path):
        self._path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Raises LoftError where a number is not finite."""
        line = to_json_text(event, str(self._path))
        with open(self._path, "a", opener=_open_no_link) as file:
            file.write(line + "\n")

    def lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The whole lines, and what they say; what was torn when the machine went down is passed over, and so are NaN and infinity."""
        if not self._path.exists():
            return
        try:
            with open_plain(self._path) as file:
                while line := file.readline(_LINE_BYTES):
                    event = _event(line)
                    if event:
                        yield line, event
        except OSError as problem:
            raise LoftError(f"{self._path} cannot be read ({problem.strerror}): remove it") from None

    def forget_after(self, step: int) -> None:
        """Drop the lines about later steps."""
        kept = [line for line, event in self.lines() if event["step"] <= step]
        if self._path.exists():
            write_atomically(self._path, b"".join(kept))


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for one that is torn or nobody's event at a step."""
    try:
        event = from_json_text(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and type(event.get("step")) is int and 0 <= event["step"] <= MAX_STEPS else None


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
