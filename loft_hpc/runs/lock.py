"""One job at a time writes a run."""

import fcntl
import os
import platform
from datetime import datetime
from pathlib import Path

from loft_hpc.errors import LoftError
from loft_hpc.jsontext import from_json_text, to_json_text

NAME = ".lock"


class RunLock:
    """Held by rank 0 from before a run's first file is written until its last one is.

    An advisory lock of the kernel's on RUN/.lock, which says whose it is. It goes with the process that holds it, however that ends, so
    there are no stale locks to recognise; file systems on several nodes know it too (NFS, Lustre with `flock`).
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._handle: int | None = None

    def acquire(self) -> None:
        """Raises LoftError, naming the owner, where another job holds it, or where the run's folder cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as problem:
            raise LoftError(f"{self._path.parent} cannot be written ({problem.strerror}): name another --run") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 4096)
            os.close(handle)
            raise LoftError(f"{self._path.parent} is being written by {_told(owner)}: wait for its end, or name another --run") from None
        except OSError as problem:
            os.close(handle)
            raise LoftError(f"{self._path} cannot be locked ({problem.strerror}): name a --run on a file system that knows flock") from None
        owner = {"host": platform.node(), "process": os.getpid(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, to_json_text(owner).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Let others in; harmless where it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _told(owner: bytes) -> str:
    try:
        fields = from_json_text(owner)
        return f"process {fields['process']} on {fields['host']} since {fields['since']}"
    except (ValueError, KeyError, TypeError):
        return "another job"
