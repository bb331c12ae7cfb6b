"""A job of `slurm_cluster.Cluster`: what it does, waited for with time limits."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm_cluster import Cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
"""States in which a job stays."""


class SlurmJob:
    """A job that was submitted."""

    def __init__(self, cluster: "Cluster", number: int, cwd: Path):
        self._cluster, self.number, self._cwd = cluster, number, cwd

    @property
    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and so on."""
        words = self._cluster.run("scontrol", "show", "job", "--oneliner", str(self.number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def output(self) -> str:
        """What the job has printed so far."""
        return "".join(file.read_text() for file in self._cwd.glob(f"*-{self.number}.out"))

    def processes(self) -> list[int]:
        """What the job has running: batch shell, launcher, ranks."""
        return self._cluster.processes(f"SLURM_JOB_ID={self.number}")

    def wait(self, what: str, there: Callable[[], bool], seconds: float = 240) -> None:
        """Wait for something to become true. Raises AssertionError, with what the job printed, after `seconds`."""
        end = time.monotonic() + seconds
        while not there():
            fields = self.fields
            assert time.monotonic() < end, f"no {what} within {seconds} s\n{fields}\n{self.output}"
            time.sleep(0.2)

    def wait_for_state(self, *states: str, seconds: float = 240) -> str:
        self.wait(" or ".join(states), lambda: self.state in states, seconds)
        return self.state

    def wait_for_end(self, seconds: float = 400) -> str:
        """The state in which the job ended for good."""
        return self.wait_for_state(*ENDED, seconds=seconds)

    def warn(self, signal: str = "USR1") -> None:
        """Send what `#SBATCH --signal=B:USR1@N` sends, the way that it takes."""
        self._cluster.run("scancel", "--batch", f"--signal={signal}", str(self.number))

    def restart(self) -> None:
        """Start a job that was requeued, which Slurm holds back for two minutes."""
        self.wait_for_state("PENDING")
        spool = self._cluster.folder / "spool"
        self.wait("end of the old start's steps", lambda: not any(spool.glob(f"*[._]{self.number}.*")))
        time.sleep(3)  # sooner, the job's credential is refused
        self._cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.wait_for_state("RUNNING", *ENDED)
