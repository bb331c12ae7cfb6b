"""The byte ledger against the kernel: real trainings over network namespaces, one host per rank, MPI over TCP.

Columns of the first table: `payload` is what the ranks handed over, `ledger` what the textbook algorithms make all of them send, both
from ledger.json; `kernel` is what the hosts' network interfaces sent; `worst host` the largest deviation of one host's interface from
its own rank's ledger. The second table says where the overhead comes from: by a short training and the long one of the same kind, and
by what the kernel says of its packets; `neither` is what they held beyond ledger and retransmission. The third is the start alone.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from loft_hpc.runs.run import Run

from hosts import Hosts, Launched, Traffic, available

FRAME_HEADERS = 14 + 20 + 32
"""Bytes before the contents of a packet: Ethernet, IPv4, TCP with time stamps."""
SEGMENT = 1500 - 20 - 32
"""Bytes in a TCP segment that is sent again: Ethernet's 1500 without the headers of IPv4 and TCP."""

# Large enough that the traffic of the start is small beside that of the training, and well under a minute on two cores.
TRAINING = "--model resnet20 --widen 4 --batch-size 32 --snapshot-every 0 --evaluate-every 1000 --statistics-batches 4"

# The algorithms that the ledger's wire columns assume (docs/communication.md). Open MPI's own choice has the same totals, but sends
# small broadcasts linearly from the root, which puts other shares on the hosts.
TEXTBOOK = {
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_allreduce_algorithm": "ring",
    "coll_tuned_allgather_algorithm": "ring",
    "coll_tuned_allgatherv_algorithm": "ring",
    "coll_tuned_alltoall_algorithm": "pairwise",
    "coll_tuned_alltoallv_algorithm": "pairwise",
    "coll_tuned_bcast_algorithm": "pipeline",
}

# One thread per rank, for ranks share the cores though each thinks that its host is its own. Horovod's ranks ask one another every
# millisecond what there is to do, which at over 100 kB/s and host would be the larger part of the overhead: every 50 ms here.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HOROVOD_CYCLE_TIME": "50"}


@dataclass(frozen=True)
class Case:
    """A kind of training, and how much of it makes a short and a long one."""

    options: str
    short: str
    long: str


CASES = {
    "loft": Case("--strategy loft --partition paper --local-iterations 1", "--rounds 1", "--rounds 60"),
    "loft-alltoall-bfloat16": Case(
        "--strategy loft --partition all-blocks --exchange alltoall --transport-dtype bfloat16 --local-iterations 1 --widen 16",
        "--rounds 1",
        "--rounds 40",
    ),
    "data-parallel": Case("--strategy data-parallel", "--epochs 1 --batch-size 1024", "--epochs 2"),
    "gpipe": Case("--strategy gpipe --split balanced --micro-batches 4 --widen 1", "--epochs 1", "--epochs 8"),
}


@dataclass(frozen=True)
class Measurement:
    """One training, as its ledger and as the kernel saw it."""

    name: str
    payload_bytes: int
    """What all ranks handed over."""
    ledger_bytes: tuple[int, ...]
    """By rank: what the ledger says that it sent, for all purposes."""
    traffic: tuple[Traffic, ...]
    """By host, which is by rank: what the kernel counted."""

    @property
    def ledger(self) -> int:
        return sum(self.ledger_bytes)

    @property
    def kernel(self) -> int:
        return sum(host.sent_bytes for host in self.traffic)

    @property
    def packets(self) -> int:
        return sum(host.sent_packets for host in self.traffic)

    @property
    def retransmitted_segments(self) -> int:
        return sum(host.retransmitted_segments for host in self.traffic)

    @property
    def contents_bytes(self) -> tuple[int, ...]:
        """By host: what its packets held behind their headers, MPI's own headers and what was sent again included."""
        return tuple(host.sent_bytes - host.sent_packets * FRAME_HEADERS for host in self.traffic)

    @property
    def overhead_bytes(self) -> int:
        return self.kernel - self.ledger

    @property
    def uncounted_bytes(self) -> int:
        """What the packets held and the ledger does not count: MPI's headers, Horovod's negotiation, the launcher's wiring up."""
        return sum(self.contents_bytes) - self.retransmitted_segments * SEGMENT - self.ledger

    @property
    def worst_deviation(self) -> float:
        """The largest deviation of one host's interface from its own rank's ledger."""
        return max((host.sent_bytes / ledger - 1 for host, ledger in zip(self.traffic, self.ledger_bytes, strict=True)), key=abs)


class TrainingFailed(RuntimeError):
    """A training that did not come to its end; the text is the end of its output."""


def measure(name: str, ranks: int, long: bool = True, seconds: float = 180, one_frame: bool = False) -> Measurement:
    """Train as CASES[name] says, on as many hosts as ranks. Raises TrainingFailed."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder, Hosts(ranks, one_frame=one_frame) as hosts:
        run = Path(folder) / "run"
        options = [*TRAINING.split(), *case.options.split(), *(case.long if long else case.short).split(), "--run", str(run)]
        result = hosts.launch(["loft", "pretrain", *options], cwd=Path(folder), seconds=seconds, environment=ENVIRONMENT, mca=TEXTBOOK)
        traffic = tuple(hosts.traffic())
        check(result, run)
        ledgers = Run.open(run).read_ledgers()
    totals = [[entry for purposes in ledger.entries.values() for entry in purposes.values()] for ledger in ledgers]
    return Measurement(
        name,
        sum(entry.payload_sent_bytes for entries in totals for entry in entries),
        tuple(sum(entry.wire_sent_bytes for entry in entries) for entries in totals),
        traffic,
    )


def check(result: Launched, run: Path) -> None:
    """Raise TrainingFailed unless the run says of itself that it is done; mpirun's exit code alone does not."""
    if result.code == 0 and (run / "run.json").exists() and Run.open(run).description["status"] == "done":
        return
    raise TrainingFailed(_end_of(result))


def _end_of(result: Launched) -> str:
    return f"exit code {result.code}\n{result.out[-2000:]}\n{result.err[-3000:]}"


def marginal_overhead(short: Measurement, long: Measurement) -> float:
    """Overhead of each further byte, without what the start costs."""
    return (long.kernel - short.kernel) / (long.ledger - short.ledger) - 1


@dataclass(frozen=True)
class Idle:
    """What all hosts together send, in bytes, for a job that trains nothing."""

    launcher: int
    """The launcher's daemons find one another, start programs that do nothing, and end."""
    joined: int
    """Over and above that, the ranks join MPI and Horovod."""
    per_second: float
    """Horovod's ranks ask one another what there is to do, and there is nothing."""


def measure_idle(ranks: int) -> Idle:
    """Launch jobs that send nothing. Raises TrainingFailed."""

    def sent(*command: str) -> int:
        with Hosts(ranks) as hosts:
            result = hosts.launch(list(command), seconds=60, environment=ENVIRONMENT, mca=TEXTBOOK)
            if result.code != 0:
                raise TrainingFailed(_end_of(result))
            return sum(hosts.sent_bytes())

    def joined_for(seconds: int) -> int:
        return sent("python", "-c", f"import time; from loft_hpc.comm.start import start; start(); time.sleep({seconds})")

    # Not `true`: where ranks end before the launcher has wired up, it may wait for them for ever.
    launcher, briefly, longer = sent("sleep", "1"), joined_for(1), joined_for(11)
    per_second = (longer - briefly) / 10
    return Idle(launcher, round(briefly - per_second - launcher), per_second)


TOTALS_HEADER = "| case | ranks | payload | ledger | kernel | overhead, bytes | overhead | worst host |\n|---|---|---|---|---|---|---|---|"
ORIGINS_HEADER = (
    "| case | short: ledger | short: overhead | of each further byte | long: packets | their headers | segments sent again | neither |\n"
    "|---|---|---|---|---|---|---|---|"
)
IDLE_HEADER = "| a job that trains nothing | bytes, all hosts |\n|---|---|"


def totals_row(it: Measurement) -> str:
    return (
        f"| {it.name} | {len(it.ledger_bytes)} | {it.payload_bytes:,} | {it.ledger:,} | {it.kernel:,} | {it.overhead_bytes:,} "
        f"| {it.overhead_bytes / it.ledger:.3%} | {it.worst_deviation:+.3%} |"
    )


def origins_row(short: Measurement, long: Measurement) -> str:
    return (
        f"| {long.name} | {short.ledger:,} | {short.overhead_bytes:,} | {marginal_overhead(short, long):.3%} | {long.packets:,} "
        f"| {long.packets * FRAME_HEADERS:,} | {long.retransmitted_segments:,} | {long.uncounted_bytes:,} |"
    )


def idle_rows(it: Idle) -> str:
    return (
        f"| launcher starts and ends | {it.launcher:,} |\n| ranks join MPI and Horovod | {it.joined:,} |\n"
        f"| each second of waiting for work | {it.per_second:,.0f} |"
    )


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(2, 16), default=4, show_default=True, help="Ranks, each on a host of its own.")
@click.option("--strategy", "names", type=click.Choice(list(CASES)), multiple=True, help="Kinds of training to measure.  [default: all]")
@click.option("--one-frame", is_flag=True, help="Packets that fit a frame of Ethernet, as a real card sends them, in place of up to 64 kB.")
def main(ranks: int, names: tuple[str, ...], one_frame: bool) -> None:
    reason = available()
    if reason:
        raise click.ClickException(reason)
    pairs = []
    try:
        for name in names or CASES:
            click.echo(f"{name}: a short and a long training over {ranks} hosts", err=True)
            pairs.append((measure(name, ranks, long=False, one_frame=one_frame), measure(name, ranks, one_frame=one_frame)))
        idle = measure_idle(ranks)
    except TrainingFailed as problem:
        raise click.ClickException(str(problem)) from None
    click.echo("\n".join([TOTALS_HEADER, *(totals_row(long) for _, long in pairs), ""]))
    click.echo("\n".join([ORIGINS_HEADER, *(origins_row(short, long) for short, long in pairs), ""]))
    click.echo("\n".join([IDLE_HEADER, idle_rows(idle)]))


if __name__ == "__main__":
    main()
