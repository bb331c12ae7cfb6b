"""Several hosts on one machine: a network namespace each, joined by a switch, so that the kernel counts what MPI really sends.

Each host has an interface `eth0` of its own, whose other end is a port of a bridge in one more namespace. Nothing is added to the
machine's own network, so several sets of hosts, all with the same addresses, can live side by side. Needs root and iproute2.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "loft"
_NAMES_OF_HOSTS = Path("/etc/netns")
"""Where `ip netns exec` looks for a namespace's own /etc/hosts."""
_sets = itertools.count()

# Takes the place of ssh: drops ssh's options, and runs the rest of the line in the namespace of the host that is named first. The
# host has a name of its own as well (--uts), by which Open MPI tells hosts apart.
_AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c 'echo "$0" > /proc/sys/kernel/hostname; exec sh -c "$1"' "$host" "$*"
"""

# TCP and nothing else between ranks, also those of one host. `han` (collectives in two levels) takes a minute with two ranks a host.
_OVER_TCP = ("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0", "--mca", "coll", "^han")
_ON_FEW_CORES = ("--mca", "mpi_yield_when_idle", "1", "--bind-to", "none")


@dataclass(frozen=True)
class Launched:
    """How a job ended."""

    code: int
    """mpirun's exit code; -9 where the time limit ended the job."""
    out: str
    err: str


@dataclass(frozen=True)
class Traffic:
    """What a host's eth0 and its TCP have done since the host was made."""

    sent_bytes: int
    """Ethernet headers included. A packet of up to 64 kB that a real card would cut up counts once, with one header."""
    received_bytes: int
    sent_packets: int
    retransmitted_segments: int


class Hosts:
    """`count` hosts, for the length of a `with`.

    `rate_mbit` limits every link, in both directions, to so many Mbit/s. `one_frame` makes every packet fit a frame of Ethernet, as a
    real card would send it, in place of up to 64 kB. Whatever still runs on the hosts at the end is killed.
    """

    def __init__(self, count: int, rate_mbit: float | None = None, one_frame: bool = False):
        self._set = f"{_PREFIX}-{os.getpid()}-{next(_sets)}"
        self.names = [f"{self._set}-h{number}" for number in range(count)]
        self._switch = f"{self._set}-switch"
        self._rate_mbit, self._one_frame = rate_mbit, one_frame
        self._folder: Path | None = None
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Hosts":
        _remove_leftovers()
        self._remove()  # of an earlier process with our number, perhaps
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    # -- making and removing ----------------------------------------------------------------------------------------------

    def _make(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._set}-"))
        self._agent.write_text(_AGENT)
        self._agent.chmod(0o755)
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "dev", "bridge", "addrgenmode", "none", "up")
        names = "".join(f"{_address(number)} {name}\n" for number, name in enumerate(self.names))
        for number, name in enumerate(self.names):
            folder = _NAMES_OF_HOSTS / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
            self._plug_in(number, name)

    def _plug_in(self, number: int, name: str) -> None:
        """A namespace whose eth0 is connected to port `number` of the switch."""
        port = f"port{number}"
        _ip("netns", "add", name)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        # addrgenmode: no address of its own for IPv6, whose announcements would be counted as well.
        for namespace, interface in ((self._switch, port), (name, "eth0")):
            _ip("-n", namespace, "link", "set", "dev", interface, "addrgenmode", "none")
            _keep_in_order(namespace, interface)
            if self._one_frame:
                _ip("-n", namespace, "link", "set", "dev", interface, "gso_max_segs", "1")
            if self._rate_mbit is not None:
                rate = ("rate", f"{self._rate_mbit}mbit", "burst", "256kb", "latency", "50ms")
                _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *rate)
        _ip("-n", self._switch, "link", "set", "dev", port, "master", "bridge", "up")
        _ip("-n", name, "address", "add", f"{_address(number)}/16", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", name, "link", "set", "dev", interface, "up")

    def _remove(self) -> None:
        self.kill_all()
        for name in [*self.names, self._switch]:
            _forget(name)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- using ------------------------------------------------------------------------------------------------------------

    @property
    def _agent(self) -> Path:
        return self._folder / "agent"

    def launch(
        self, command: list[str], ranks_per_host: int = 1, cwd: Path | None = None, seconds: float = 120,
        environment: dict[str, str] | None = None, mca: dict[str, str] | None = None,
    ) -> Launched:  # fmt: skip
        """Run a command under mpirun over all hosts, from the first one. What takes longer than `seconds` is killed everywhere.

        `mca` gives further parameters of Open MPI. The ranks find this interpreter's programs first.
        """
        places = ",".join(f"{name}:{ranks_per_host}" for name in self.names)
        settings = [word for name, value in (mca or {}).items() for word in ("--mca", name, value)]
        mpirun = [
            "mpirun", "--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(self._agent), "--host", places,
            "--map-by", f"ppr:{ranks_per_host}:node:OVERSUBSCRIBE", *_OVER_TCP, *_ON_FEW_CORES, *settings, *command,
        ]  # fmt: skip
        return self.run(0, mpirun, cwd, seconds, environment)

    def run(
        self, host: int, command: list[str], cwd: Path | None = None, seconds: float = 120, environment: dict[str, str] | None = None
    ) -> Launched:
        """Run a command on one host. What takes longer than `seconds` is killed, with everything else on any host."""
        process = self.start(host, command, cwd, environment)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = process.communicate()
            return Launched(-signal.SIGKILL, out, f"{err}\nstill running after {seconds} s: killed")
        return Launched(process.returncode, out, err)

    def start(
        self, host: int, command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on one host and go on."""
        process = subprocess.Popen(
            [str(self._agent), self.names[host], shlex.join(command)], cwd=cwd, env=self._environment() | (environment or {}),
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def _environment(self) -> dict[str, str]:
        # The daemons on the other hosts inherit this through the agent. TMPDIR: what a killed job leaves there goes with the hosts.
        return os.environ | {"PATH": _path(), "TMPDIR": str(self._folder)}

    def traffic(self) -> list[Traffic]:
        """Each host's counters, as the kernel has them now."""
        return [_traffic(name) for name in self.names]

    def sent_bytes(self) -> list[int]:
        """Bytes that each host has sent since it was made."""
        return [traffic.sent_bytes for traffic in self.traffic()]

    def received_bytes(self) -> list[int]:
        """Bytes that each host has received since it was made."""
        return [traffic.received_bytes for traffic in self.traffic()]

    def kill_all(self) -> None:
        """End every process on the hosts, at once."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it may not have entered its host yet
        _kill_all(self.names)


def available() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    programs = {name: shutil.which(name, path=_path()) for name in ("ip", "tc", "unshare", "mpirun")}
    missing = [name for name, place in programs.items() if not place]
    if missing:
        return f"{missing[0]} is not installed"
    if "Open MPI" not in _run(programs["mpirun"], "--version"):
        return "mpirun is not Open MPI's, whose parameters are set here"
    try:
        with Hosts(1) as hosts:
            result = hosts.run(0, ["true"], seconds=10)
    except (RuntimeError, OSError) as problem:
        return f"no network namespaces: {problem}"
    return None if result.code == 0 else f"no network namespaces: {result.err.strip()}"


def _path() -> str:
    """Where programs are looked for: this interpreter's own first."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def _address(number: int) -> str:
    return f"10.77.{number // 250}.{number % 250 + 1}"


def _keep_in_order(namespace: str, interface: str) -> None:
    """Let one core handle all packets of a connection that arrive here (receive packet steering).

    By default the core that sent a packet does; as ranks move between cores packets overtake one another, TCP takes them for lost,
    and what it sends again is up to 5 % of the traffic.
    """
    cores = f"{(1 << min(os.cpu_count() or 1, 32)) - 1:x}"
    file = f"/sys/class/net/{interface}/queues/rx-0/rps_cpus"
    with suppress(RuntimeError):  # a kernel for one core has no such file, and no need of it
        _ip("netns", "exec", namespace, "sh", "-c", f"echo {cores} > {file}")  # /sys there is the namespace's own


def _traffic(name: str) -> Traffic:
    link = json.loads(_ip("-n", name, "-json", "-statistics", "link", "show", "eth0"))[0]["stats64"]
    # /proc/net belongs to the namespace of the process that reads it.
    lines = [line.split() for line in _ip("netns", "exec", name, "cat", "/proc/net/snmp").splitlines() if line.startswith("Tcp:")]
    tcp = dict(zip(*lines))
    return Traffic(link["tx"]["bytes"], link["rx"]["bytes"], link["tx"]["packets"], int(tcp["RetransSegs"]))


def _pids(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30)
    return [int(pid) for pid in found.stdout.split()]  # nothing where there is no such namespace


def _kill_all(names: list[str]) -> None:
    for _ in range(100):  # a process may start another one while it is being killed
        pids = [pid for name in names for pid in _pids(name)]
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _forget(name: str) -> None:
    """Remove a namespace, if it is there, and its /etc/hosts."""
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
    shutil.rmtree(_NAMES_OF_HOSTS / name, ignore_errors=True)
    with suppress(OSError):  # others keep something there, or it is gone
        _NAMES_OF_HOSTS.rmdir()


def _remove_leftovers() -> None:
    """Remove what a process left behind that was killed before it could clean up."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = re.fullmatch(rf"{_PREFIX}-(\d+)-\d+-\w+", name)
        if owner and not Path("/proc", owner[1]).exists():
            _kill_all([name])
            _forget(name)
            for folder in Path(tempfile.gettempdir()).glob(f"{name.rpartition('-')[0]}-*"):
                shutil.rmtree(folder, ignore_errors=True)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    """Output of a command that must succeed. Raises RuntimeError with what it complained about."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
