"""A Slurm cluster of one node on this machine: munge, controller and node daemon of its own, on ports and in a folder of its own.

Nothing is added to the machine's own configuration, so several clusters, and a real one, can live side by side. Needs root, for the
daemon of a node starts jobs as whoever sent them.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launching import LAUNCH_ENVIRONMENT
from slurm_job import SlurmJob

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CPUS = 4
_PREFIX = "loft-slurm-"

# What a cluster has by default stays so, requeueing included. Two partitions, so that a job of one is preempted by a job of the other,
# with two minutes' notice. Scheduling is quicker than usual, and a node has more CPUs than the machine.
_CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
FirstJobId={first_job}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def available() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, to start Slurm's daemons"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    return f"{missing[0]} is not installed: apt-get install slurm-wlm munge libpmix-dev" if missing else None


class Cluster:
    """A running cluster, for the length of a `with`. Whatever its jobs have left behind is killed at the end."""

    def __enter__(self) -> "Cluster":
        _remove_leftovers()
        self.folder = Path(
            tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
        )  # short: Slurm puts sockets there, whose paths may have 107 bytes
        self.host = socket.gethostname().split(".")[0]
        self._daemons: list[subprocess.Popen] = []
        self.environment = _clean_environment() | LAUNCH_ENVIRONMENT | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self.processes)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        _kill(self.processes)  # a daemon may have started another one meanwhile
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        controller_port, node_port = _free_ports(2)
        text = _CONFIGURATION.format(
            first_job=random.randrange(1000, 60_000_000),  # srun would fall over what a killed cluster's step of the same number left
            name=self.folder.name,
            host=self.host,
            folder=self.folder,
            cpus=CPUS,
            controller_port=controller_port,
            node_port=node_port,
        )
        (self.folder / "slurm.conf").write_text(text)
        # Devices of some kind, for Slurm to count as GPUs.
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero", "full", "random")))
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--force", "--foreground", *(f"--{option}={self.folder}/munge.{file}" for option, file in files.items()))
        self._wait("munge's socket", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D", "-N", self.host)
        self._wait("an idle node", lambda: " IDLE" in self.try_run("sinfo", "-h", "-o", " %T").stdout.upper())

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder)
            )

    def _wait(self, what: str, there: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not there():
            if time.monotonic() > end:
                logs = "".join(f"\n{file.name}: {file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.[lo][ou][gt]")))
                raise RuntimeError(f"Slurm did not start, no {what}:{logs}")
            time.sleep(0.05)

    # -- using ------------------------------------------------------------------------------------------------------------

    def try_run(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run a command as a user of the cluster would; it may fail."""
        settings = self.environment | (environment or {})
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=60)

    def starts_ranks(self) -> bool:
        """Whether `srun --mpi=pmix` works: Slurm's plugin looks for libpmix.so, which comes with libpmix-dev alone."""
        return self.try_run("srun", "--mpi=pmix", "true").returncode == 0

    def run(self, *command: str, **where: object) -> str:
        """Output of a command that must succeed."""
        result = self.try_run(*command, **where)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def submit(self, *arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> "SlurmJob":
        """`sbatch ARGUMENTS`, typed in the folder `cwd`."""
        out = self.run("sbatch", *arguments, cwd=cwd, environment=environment)
        return SlurmJob(self, int(re.search(r"Submitted batch job (\d+)", out)[1]), cwd)

    def lose_node(self) -> None:
        """Make the controller take the node for lost, until it answers."""
        self.run("scontrol", "update", f"NodeName={self.host}", "State=DOWN", "Reason=test")

    def cancel_all(self) -> None:
        """Empty the queue, and wait until the node is free."""
        self.run("scancel", "--user=root")
        end = time.monotonic() + 120
        while self.run("squeue", "--noheader"):
            assert time.monotonic() < end, self.run("squeue")
            time.sleep(0.2)

    def processes(self, *marks: str) -> list[int]:
        """Everything that runs in this cluster, its daemons included; or what has the `marks` in its environment as well."""
        return _marked(f"SLURM_CONF={self.folder}/slurm.conf", *marks)


def _kill(processes: Callable[[], list[int]]) -> None:
    for _ in range(100):  # a process may start another one while it is being killed
        found = processes()
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(*marks: str) -> list[int]:
    """Processes that have all these variables in their environment, each given as NAME=VALUE."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit() and {mark.encode() for mark in marks} <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def _remove_leftovers() -> None:
    """Remove clusters of tests that were killed before they could clean up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            _kill(lambda folder=folder: _marked(f"SLURM_CONF={folder}/slurm.conf"))
            shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _clean_environment() -> dict[str, str]:
    """This process's, without what a job around it was told."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "LOFT_"))}


def _path() -> str:
    """Where programs are looked for; daemons lie where only root looks."""
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
