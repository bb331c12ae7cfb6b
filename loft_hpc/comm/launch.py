"""What the launcher says about this process, before MPI is started. With cli/, the only readers of environment variables."""

import os
import pwd
import sys
import tempfile
from pathlib import Path

from loft_hpc.errors import LoftError

# Variables that hold (rank, size of the job), from the most to the least trustworthy. Slurm's are those of the running step:
# SLURM_NTASKS also stands in a batch script, where a single process is no mistake.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def announced() -> tuple[int, int] | None:
    """(rank, world size) as the launcher announced them; None for a process that no launcher started."""
    for rank, size in _LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def announced_rank() -> int:
    """This process's rank as far as the launcher said; 0 without a launcher."""
    said = announced()
    return said[0] if said else 0


def home_of_user() -> str:
    """What HOME should be: the home folder by the machine's list of users; for a user who is not in it, the temporary folder."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return tempfile.gettempdir()


def refuse_without_home() -> None:
    """Raises LoftError where HOME is not set: MPI would end the process in words of its own."""
    if not os.environ.get("HOME"):
        raise LoftError(f"HOME is not set, and Open MPI does not start without it: export HOME={home_of_user()}")


def threads_chosen_by_user() -> int | None:
    """OMP_NUM_THREADS, where somebody set it to a number."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def cpp_compiler() -> str:
    """The C++ compiler that torch compiles networks with, as it looks for it."""
    return os.environ.get("CXX", "g++")


_LAUNCHER_PROGRAMS = ("mpirun", "mpiexec", "prterun", "orterun", "prted", "orted")


def output_is_terminal() -> bool:
    """Whether standard output ends at a terminal, where somebody watches.

    Open MPI gives every rank a pseudo-terminal of its own, so under a launcher what counts is the launcher's output.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    if announced() is None:
        return True
    process = os.getppid()
    while process > 1:
        folder = Path("/proc") / str(process)
        try:
            if (folder / "comm").read_text().strip() in _LAUNCHER_PROGRAMS:
                return os.readlink(folder / "fd/1").startswith(("/dev/pts/", "/dev/tty"))
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False
