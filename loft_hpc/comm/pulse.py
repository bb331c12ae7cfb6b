"""Signs of life of one rank: when it last got on, and what it waits for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Felt by the rank's main thread, looked at by its watchdog's."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        """When the rank last got on, on the clock of `time.monotonic`."""
        self.waits_for: str | None = None
        """The collective or message in which it waits for others; None while it is at work itself."""

    def beat(self) -> None:
        """The rank has got on: a batch, a collective that is over."""
        self.last = time.monotonic()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """While the rank waits for others."""
        self.waits_for = name
        try:
            yield
        finally:
            self.waits_for = None
            self.beat()
