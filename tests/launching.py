"""Launching ranks with real mpirun."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

# Ranks beyond the cores, and root inside a container, are no reason to refuse here.
LAUNCH_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

_FOLDERS = tempfile.TemporaryDirectory(prefix="loft-")


def launch_environment() -> dict[str, str]:
    """For one launch. An mpirun that is killed leaves its sockets in a folder named by its process number, over which a later one that
    gets the same number would fall: each has a temporary folder of its own."""
    return os.environ | LAUNCH_ENVIRONMENT | {"TMPDIR": tempfile.mkdtemp(dir=_FOLDERS.name)}


@dataclass(frozen=True)
class Launched:
    code: int
    out: str
    err: str


def launch(ranks: int, *command: str, cwd: Path | None = None, seconds: float = 240, environment: dict | None = None) -> Launched:
    """Run a command under mpirun (ranks > 0) or by itself (0). One that takes longer fails the test in place of hanging it."""
    mpirun = ["mpirun", "-np", str(ranks)] if ranks else []
    process = subprocess.Popen(
        [*mpirun, *command], cwd=cwd, env=launch_environment() | (environment or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} on {ranks} ranks was still running after {seconds} s\n{out[-3000:]}\n{err[-3000:]}")
    return Launched(process.returncode, out, err)


def loft(*arguments: str, ranks: int = 0, cwd: Path | None = None, seconds: float = 240, environment: dict | None = None) -> Launched:
    """The loft command, as a user types it."""
    return launch(ranks, "loft", *map(str, arguments), cwd=cwd, seconds=seconds, environment=environment)


def told(result: Launched) -> list[str]:
    """The lines that loft itself wrote to standard error (mpirun adds remarks of its own to a non-zero exit)."""
    return [line for line in result.err.splitlines() if line.startswith("loft: ")]
