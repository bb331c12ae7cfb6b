"""Ranks that were started differently must not train together: found out before anything depends on it."""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import loft_hpc
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.packages import installed_versions

_PACKAGES = ("torch", "horovod", "mpi4py", "numpy")


@cache
def code_version() -> str:
    """The version with the beginning of a SHA-256 over the package's source files: checkouts of one version may differ."""
    folder, digest = Path(loft_hpc.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return f"{loft_hpc.__version__} ({digest.hexdigest()[:12]})"


def software() -> dict[str, str]:
    """What a rank computes with, by name."""
    return {"loft-hpc": code_version(), "Python": platform.python_version(), **installed_versions(_PACKAGES)}


def refuse_disagreement(what: Mapping[str, Any], world: World) -> None:
    """Raises LoftError, on all ranks, unless all of them give the same values by the same names. Collective."""
    everybody = world.gather_objects(dict(what))
    for rank, theirs in enumerate(everybody):
        for name in everybody[0].keys() | theirs.keys():
            here, there = everybody[0].get(name), theirs.get(name)
            if here != there and not (here != here and there != there):  # NaN is the same to all who have it
                raise LoftError(f"rank 0 was started with {name} {here}, rank {rank} with {there}: start all ranks alike", everywhere=True)
