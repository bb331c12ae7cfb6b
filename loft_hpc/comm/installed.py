"""What MPI and Horovod on this machine are, found out without starting them in this process."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loft_hpc.comm.launch import announced, home_of_user
from loft_hpc.jsontext import from_json_text

PATIENCE_SECONDS = 60

_MPI = """
import json
from mpi4py import MPI, __version__
library = MPI.Get_library_version().splitlines()[0].split("\\0")[0].strip()
print(json.dumps({"mpi4py": __version__, "library": library, "thread_multiple": MPI.Query_thread() >= MPI.THREAD_MULTIPLE}))
"""
_HOROVOD = """
import json
from mpi4py import MPI
import horovod, horovod.torch as hvd
print(json.dumps({"version": horovod.__version__, "mpi": bool(hvd.mpi_built()), "gloo": bool(hvd.gloo_built()),
                  "nccl": bool(hvd.nccl_built()), "cuda": bool(hvd.cuda_built())}))
"""


@dataclass(frozen=True)
class Probe:
    """What a short program in a process of its own found: facts, or the last line of what went wrong."""

    facts: dict | None
    problem: str = ""


def probe(program: str) -> Probe:
    """Run a program that prints one JSON object as its last line. A broken MPI may kill the process that loads it, but not us."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | _home(), capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return Probe(None, str(problem).splitlines()[0])
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Probe(from_json_text(lines[-1]))
    return Probe(None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def has(module: str) -> bool:
    """Whether a module is installed, working or not."""
    return find_spec(module) is not None


def mpi() -> Probe:
    """mpi4py's version, the MPI library it loads, and whether that gives MPI_THREAD_MULTIPLE."""
    return probe(_MPI)


def horovod() -> Probe:
    """Horovod's version and what it was built with."""
    return probe(_HOROVOD)


@dataclass(frozen=True)
class Launcher:
    """The mpirun on the PATH."""

    path: str
    version: str
    problem: str = ""
    """Why it starts nothing, in its own words; empty where it started a process, or where this process is itself under a launcher."""
    remedy: str = ""


def launcher() -> Launcher | None:
    """Raises nothing: an mpirun that does not start is what this is to find out."""
    path = shutil.which("mpirun")
    if path is None:
        return None
    version = _run([path, "--version"], os.environ | _home())
    lines = version.stdout.strip().splitlines()
    if version.returncode or not lines:
        return Launcher(path, "", _reason(version), "load the MPI module that bin/setup was run with, or run bin/setup")
    if announced():
        return Launcher(path, lines[0])  # it would start another mpirun inside a job, which is refused
    started = _run([path, "-np", "1", sys.executable, "-c", ""], os.environ | _home())
    return Launcher(path, lines[0], _reason(started), _remedy(started.stderr)) if started.returncode else Launcher(path, lines[0])


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=PATIENCE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return subprocess.CompletedProcess(command, 1, "", str(problem).splitlines()[0])


def _reason(done: subprocess.CompletedProcess) -> str:
    """The first line that says something, in place of Open MPI's rules and Python's tracebacks."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip("- ")]
    return f"does not start: {lines[0] if lines else f'exit code {done.returncode}'}"


def _remedy(words: str) -> str:
    if "as root" in words:
        return "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    if not writable_temporary_folder():
        return f"export TMPDIR={usable_temporary_folder()}"
    if "listener thread" in words:
        return "remove your own ompi.* from the temporary folder, and free space there"
    return "load the MPI module that bin/setup was run with, or run bin/setup"


SHARED_MEMORY_BYTES = 128 << 20
"""Open MPI maps 16 MiB for each rank, and loader processes hand batches over in it; containers often have 64 MiB."""


def writable_temporary_folder() -> bool:
    """Whether the folder in which Open MPI makes its session folder takes a file."""
    return _takes_a_file(Path(os.environ.get("TMPDIR") or "/tmp"))


def usable_temporary_folder() -> str:
    return next((place for place in ("/tmp", "/var/tmp", "/dev/shm") if _takes_a_file(Path(place))), "FOLDER, one that can be written to")


def _takes_a_file(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)  # as Open MPI does
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        return True
    except OSError:
        return False


def shared_memory_bytes() -> int | None:
    """What is free in /dev/shm; None where there is none."""
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return None
    return free.f_bavail * free.f_frsize


def home() -> str | None:
    """HOME, where it is set."""
    return os.environ.get("HOME")


def _home() -> dict[str, str]:
    """HOME for the probes where it is not set, which the report says in a line of its own."""
    return {} if home() else {"HOME": home_of_user()}
