"""What MPI and Horovod on this machine are, found out without starting them in this process."""

import shutil
import subprocess
import sys
from dataclasses import dataclass

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
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return Probe(None, str(problem).splitlines()[0])
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Probe(from_json_text(lines[-1]))
    return Probe(None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def mpi() -> Probe:
    """mpi4py's version, the MPI library it loads, and whether that gives MPI_THREAD_MULTIPLE."""
    return probe(_MPI)


def horovod() -> Probe:
    """Horovod's version and what it was built with."""
    return probe(_HOROVOD)


def launcher() -> tuple[str, str] | None:
    """(path, version line) of the mpirun on the PATH."""
    path = shutil.which("mpirun")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return path, "does not start"
    return path, (done.stdout.strip().splitlines() or ["says no version"])[0]
