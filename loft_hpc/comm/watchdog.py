"""Ends a job that has come to a standstill: a rank that was stopped, a link that is down, a file system that does not answer.

Nobody else notices: MPI waits for ever, and Horovod's stall check knows only of ranks that submit nothing (facts: environment.md).
"""

import os
import platform
import sys
import threading
import time
import traceback
from types import TracebackType

import loft_hpc
from loft_hpc.comm.world import World
from loft_hpc.screen import tell

_PATIENCE_SECONDS = 5.0
"""How much longer ranks wait that wait for others: those that keep them waiting are the ones to say what is wrong."""
_LINE_ARRIVES_SECONDS = 0.5


class Watchdog:
    """For the length of a `with`, a thread in every rank; made by all ranks together.

    Ranks stand in a ring: each sends its successor a sign of life every few moments, and listens for its predecessor's. A rank whose
    predecessor has been silent for `limit_seconds`, or that has not got on itself for so long (`World.pulse`), says so and ends
    the job on all ranks. The signs of life are not in the ledger: they are no part of any algorithm, and a few bytes a second.
    """

    def __init__(self, world: World, limit_seconds: float):
        self._world, self._limit = world, limit_seconds
        self._period = min(1.0, limit_seconds / 10)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._mpi = world.mpi.Dup() if limit_seconds and world.size > 1 else None

    def __enter__(self) -> "Watchdog":
        if self._mpi is not None:
            self._main = threading.get_ident()
            self._world.pulse.beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, where: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            if kind is None:
                self._world.barrier()  # after which nothing more is sent
                self._listen()

    def _watch(self) -> None:
        rank, size = self._world.rank, self._world.size
        before, heard, looked = (rank - 1) % size, time.monotonic(), time.monotonic()
        told: list[object] = []
        while not self._over.wait(self._period):
            now = time.monotonic()
            if now - looked > 5 * self._period:  # it was this process that slept, perhaps the whole job: begin anew
                heard = now
                self._world.pulse.beat()
            looked = now
            told = [request for request in told if not request.Test()]  # type: ignore[attr-defined]
            if not told:
                told.append(self._mpi.Isend([b"", 0], (rank + 1) % size))
            if self._listen():
                heard = now
            if now - heard > self._limit:
                self._end(f"rank {before} has not been heard of for {now - heard:.0f} s")
            waits_for, still = self._world.pulse.waits_for, now - self._world.pulse.last
            if still > self._limit + (_PATIENCE_SECONDS if waits_for else 0):
                doing = f"waits for {waits_for}" if waits_for else f"does not get on in {self._place()}"
                self._end(f"this rank {doing} for {still:.0f} s")

    def _listen(self) -> bool:
        """Whether the predecessor has sent signs of life."""
        heard = False
        while self._mpi.Iprobe():
            self._mpi.Recv([bytearray(), 0])
            heard = True
        return heard

    def _place(self) -> str:
        """The line of our own code that the main thread is at."""
        root = os.path.dirname(loft_hpc.__file__)
        frames = traceback.extract_stack(sys._current_frames().get(self._main))
        for frame in reversed(frames):
            if frame.filename.startswith(root):
                return f"{os.path.relpath(frame.filename, root)}, line {frame.lineno} ({frame.name})"
        return "its start"

    def _end(self, what: str) -> None:
        line = f"loft: rank {self._world.rank} on {platform.node()}: {what} (--stall-seconds): the job ends; go on with --resume"
        tell(line, error=True)
        time.sleep(_LINE_ARRIVES_SECONDS)
        self._world.abort(1)
