"""What can go wrong with a running job of several ranks, done to it from outside."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from faulty import BIT, EXCEPTION, NAN


@dataclass
class Leg:
    """A started job."""

    process: subprocess.Popen
    path: Path
    ranks: list[int]
    """Process numbers, by rank."""


def kill_rank(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], signal.SIGKILL)


def kill_launcher(leg: Leg, victim: int) -> None:
    leg.process.kill()


def stop_rank(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], signal.SIGSTOP)


def exception(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], EXCEPTION)


def not_a_number(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], NAN)


def flipped_bit(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], BIT)


def terminate(leg: Leg, victim: int) -> None:
    leg.process.terminate()


def terminate_rank(leg: Leg, victim: int) -> None:
    os.kill(leg.ranks[victim], signal.SIGTERM)


def warn(leg: Leg, victim: int) -> None:
    leg.process.send_signal(signal.SIGUSR1)


def interrupt_twice(leg: Leg, victim: int) -> None:
    leg.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    leg.process.send_signal(signal.SIGINT)


def no_memory(leg: Leg, victim: int) -> None:
    """The rank may have no more memory than it has."""
    used = int(Path(f"/proc/{leg.ranks[victim]}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    subprocess.run(["prlimit", "--pid", str(leg.ranks[victim]), f"--as={used}"], check=False)


def no_space(leg: Leg, victim: int) -> None:
    """Rank 0, who writes everything, may not make any file longer."""
    subprocess.run(["prlimit", "--pid", str(leg.ranks[0]), "--fsize=1000"], check=False)


FAULTS = {
    "kill -9 of a rank": kill_rank,
    "kill -9 of mpirun": kill_launcher,
    "SIGSTOP of a rank": stop_rank,
    "exception on a rank": exception,
    "loss no number": not_a_number,
    "bit flipped on a rank": flipped_bit,
    "SIGTERM to mpirun": terminate,
    "SIGTERM to a rank": terminate_rank,
    "SIGUSR1 to mpirun": warn,
    "SIGINT twice": interrupt_twice,
    "out of memory on a rank": no_memory,
    "no space on the disk": no_space,
}
OF_DATA_PARALLEL = "bit flipped on a rank"
"""What LoFT averages away before anybody can see it, and what stages of a pipeline have no second copy of, is no fault to find."""
ENDS_WHOLE = ("SIGTERM to a rank", "SIGUSR1 to mpirun")
"""Told to end: exit code 85 and a checkpoint of that very step."""
AFTERWARDS = ("", "torn checkpoint")
"""What else happens once a job is gone."""
