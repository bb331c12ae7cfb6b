"""Faults in running trainings: what each does, and what became of the run.

A run is broken several times in a row, gone on with each time, and at last left alone; then its network, the losses of its epochs and
its exchanged bytes must be those of a run that nothing happened to.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors
from loft_hpc.runs.run import Run

from injections import AFTERWARDS, ENDS_WHOLE, FAULTS, OF_DATA_PARALLEL, Leg

RANKS = 4
STALL_SECONDS = 5
HANG_SECONDS = 90
"""After the fault; a job that is still there counts as a hang."""
START_SECONDS = 180
FAULTS_OF_A_RUN = 8

COMMON = ("--model", "resnet20", "--widen", "0.5", "--epochs", "5", "--batch-size", "64", "--statistics-batches", "2", "--snapshot-every", "40it",
          "--checkpoint-every", "10it")  # fmt: skip
LOOKED_AFTER = ("--stall-seconds", str(STALL_SECONDS), "--check-ranks")
STRATEGIES = {
    "loft": ("--local-iterations", "5"),
    "loft, all-to-all": ("--local-iterations", "4", "--exchange", "alltoall", "--transport-dtype", "bfloat16", "--average-every", "2",
                         "--momentum-across-rounds", "carry"),
    "data-parallel": ("--strategy", "data-parallel"),
    "gpipe": ("--strategy", "gpipe", "--split", "balanced"),
}  # fmt: skip


# -- jobs -----------------------------------------------------------------------------------------------------------------


def start(path: Path, options: tuple[str, ...], output: Path) -> subprocess.Popen:
    faulty = str(Path(__file__).with_name("faulty.py"))
    # a killed mpirun leaves its sockets in a folder named by its process number, over which a later one of that number would fall
    environment = os.environ | {"TMPDIR": tempfile.mkdtemp(dir=output.parent)}
    command = ["mpirun", "-np", str(RANKS), sys.executable, faulty, "pretrain", *options, *LOOKED_AFTER, "--run", str(path)]
    with open(output, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def ranks_of(launcher: int) -> list[int]:
    """Process numbers of the ranks of an mpirun, by rank; fewer while they start."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout.split()
    ranks = {}
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        except OSError:
            continue
        ranks |= {int(item.split("=")[1]): int(child) for item in variables if item.startswith("OMPI_COMM_WORLD_RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def alive(processes: list[int]) -> list[int]:
    found = []
    for number in processes:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(number)
        except OSError:
            pass
    return found


def checkpoint_steps(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (path / "checkpoints").glob("*") if folder.name.isdigit())


def newest_whole(path: Path) -> int:
    """The step of the newest checkpoint that can be read, -1 for none; looks at a run that is being written and touches nothing."""
    for step in reversed(checkpoint_steps(path)):
        try:
            return Run.open(path).checkpoints.read(step).step
        except LoftError:
            continue
    return -1


def differences(path: Path, whole: Path) -> list[str]:
    """What of a run that was broken is not as in the one that was not."""
    found = []
    one, other = (read_tensors(folder / "model.safetensors") for folder in (path, whole))
    if one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one):
        found.append("network")
    losses = [[(event["step"], event["loss"]) for event in Run.open(folder).events("epoch")] for folder in (path, whole)]
    if losses[0] != losses[1]:
        found.append("losses")
    exchanged = [
        [[entries.get(purpose) for purpose in ("partitioned", "shared", "gradient", "activation")] for entries in ledger.entries.values()]
        for folder in (path, whole)
        for ledger in Run.open(folder).read_ledgers()
    ]
    if exchanged[: len(exchanged) // 2] != exchanged[len(exchanged) // 2 :]:
        found.append("ledger")
    return found


@dataclass
class Tally:
    faults: Counter = field(default_factory=Counter)
    hangs: int = 0
    lost: int = 0
    differing: int = 0
    untold: int = 0
    resumed: int = 0
    slowest: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.problems.append(what)
        click.echo(f"PROBLEM: {what}")


class Torture:
    """One campaign: runs, each broken several times."""

    def __init__(self, folder: Path, faults: int, seed: int, only: tuple[str, ...]):
        self.folder, self.wanted, self.draw, self.tally = folder, faults, random.Random(seed), Tally()
        self.only = only or tuple(FAULTS)
        self.whole: dict[str, Path] = {}
        self.leg_seconds: dict[str, float] = {}

    def reference(self, strategy: str) -> Path:
        """The undisturbed run."""
        if strategy not in self.whole:
            path = self.folder / f"whole-{len(self.whole)}"
            began = time.monotonic()
            process = start(path, (*COMMON, *STRATEGIES[strategy]), self.folder / "whole.out")
            self._until_it_trains(process, path)
            trains = time.monotonic()
            if process.wait(timeout=600) != 0:
                raise SystemExit(f"the undisturbed {strategy} run failed: {(self.folder / 'whole.out').read_text()}")
            self.leg_seconds[strategy] = time.monotonic() - trains
            self.whole[strategy] = path
            click.echo(f"undisturbed {strategy}: {time.monotonic() - began:.0f} s, {self.leg_seconds[strategy]:.0f} s of them training")
        return self.whole[strategy]

    def run(self) -> Tally:
        number = 0
        strategies = list(STRATEGIES)
        deck: list[str] = []
        while sum(self.tally.faults.values()) < self.wanted:
            strategy = strategies[number % len(strategies)]
            whole, path = self.reference(strategy), self.folder / f"run-{number:03d}"
            number += 1
            options = (*COMMON, *STRATEGIES[strategy])
            for _ in range(FAULTS_OF_A_RUN):
                if not deck:
                    deck = self.draw.sample(self.only, len(self.only))
                possible = [fault for fault in deck if fault != OF_DATA_PARALLEL or strategy == "data-parallel"]
                if not possible:
                    deck = []
                    continue
                fault = possible[-1]
                if not self._break(fault, strategy, path, options):
                    break  # it was over before
                deck.remove(fault)
                options = ("--resume",)
                if sum(self.tally.faults.values()) >= self.wanted:
                    break
            self._finish(strategy, path, whole)
            shutil.rmtree(path, ignore_errors=True)
        return self.tally

    def _break(self, fault: str, strategy: str, path: Path, options: tuple[str, ...]) -> bool:
        """Start or go on, break it at a random moment; whether there was still something to break."""
        output = self.folder / "leg.out"
        process = start(path, options, output)
        self._until_it_trains(process, path)
        ranks = ranks_of(process.pid)
        time.sleep(self.draw.uniform(0, 0.4 * self.leg_seconds[strategy]))
        if process.poll() is not None or len(ranks) < RANKS:
            process.wait()
            return False
        victim = self.draw.randrange(RANKS)
        seen, began = newest_whole(path), time.monotonic()
        with suppress(ProcessLookupError):  # the rank is at its end already
            FAULTS[fault](Leg(process, path, ranks), victim)
        try:
            process.wait(timeout=HANG_SECONDS)
            while alive(ranks) and time.monotonic() - began < HANG_SECONDS:
                time.sleep(0.02)
        except subprocess.TimeoutExpired:
            pass
        seconds, said = time.monotonic() - began, output.read_text(errors="replace")
        if process.poll() is None or alive(ranks):
            self.tally.hangs += 1
            self.tally.note(f"{fault} on rank {victim} of {strategy}: still there after {seconds:.0f} s: {said[-1500:]}")
            for number in (process.pid, *alive(ranks)):
                os.kill(number, signal.SIGKILL)
            process.wait()
        if process.returncode == 0 or Run.open(path).description["status"] == "done":
            return False  # it was at its end when the fault came
        self.tally.faults[fault] += 1
        self.tally.slowest[fault] = max(self.tally.slowest.get(fault, 0), seconds)
        self._look(fault, strategy, path, seen, process.returncode, said)
        lines = [line for line in said.splitlines() if line.startswith("loft: ")]
        click.echo(
            f"{sum(self.tally.faults.values()):4} {strategy:17} rank {victim} {fault:24} exit code {process.returncode:4} {seconds:5.1f} s   {lines[0][:150] if lines else ''}"
        )
        return True

    def _look(self, fault: str, strategy: str, path: Path, seen: int, code: int, said: str) -> None:
        """Whether everything is there that was there before, and what a fault must leave is."""
        run = Run.open(path)
        if newest_whole(path) < seen:
            self.tally.lost += 1
            self.tally.note(f"{fault} in {strategy}: checkpoint {newest_whole(path)} now, {seen} before")
        if fault in ENDS_WHOLE and (code != 85 or run.description["status"] != "interrupted"):
            self.tally.untold += 1
            self.tally.note(f"{fault} in {strategy}: exit code {code}, status {run.description['status']}: {said[-1500:]}")
        if self.draw.choice(AFTERWARDS) and len(checkpoint_steps(path)) > 1:
            state = path / "checkpoints" / f"{checkpoint_steps(path)[-1]:06d}" / "state.safetensors"
            state.write_bytes(state.read_bytes()[: self.draw.randrange(state.stat().st_size)])
            self.tally.faults["checkpoint torn afterwards"] += 1

    def _finish(self, strategy: str, path: Path, whole: Path) -> None:
        if not (path / "run.json").exists():
            return
        process = start(path, ("--resume",), self.folder / "leg.out")
        try:
            code = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            self.tally.hangs += 1
            self.tally.note(f"{strategy}: the last leg does not end")
            os.killpg(process.pid, signal.SIGKILL)
            return
        self.tally.resumed += 1
        found = differences(path, whole) if code == 0 else [f"exit code {code}: {(self.folder / 'leg.out').read_text()[-1500:]}"]
        if found:
            self.tally.differing += 1
            self.tally.note(f"{strategy} {path}: other than undisturbed: {', '.join(found)}")

    def _until_it_trains(self, process: subprocess.Popen, path: Path) -> None:
        """Wait until a leg has taken the run in hand, or has ended."""
        end = time.monotonic() + START_SECONDS
        started = (path / "run.json").stat().st_mtime_ns if (path / "run.json").exists() else 0
        while process.poll() is None:
            if time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
                raise SystemExit(f"a leg did not start within {START_SECONDS} s: {(self.folder / 'leg.out').read_text()}")
            if (path / "run.json").exists() and (path / "run.json").stat().st_mtime_ns != started:
                return
            time.sleep(0.02)


@click.command(help=__doc__)
@click.option("--faults", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)), help="Only this fault (repeat for more).")
def main(faults: int, seed: int, only: tuple[str, ...]) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loft-torture-") as folder:
        tally = Torture(Path(folder), faults, seed, only).run()
    click.echo()
    for fault, count in sorted(tally.faults.items()):
        slowest = f"   longest time to the job's end {tally.slowest[fault]:5.1f} s" if fault in tally.slowest else ""
        click.echo(f"{fault:28} {count:4}{slowest}")
    click.echo(
        f"{sum(tally.faults.values())} faults, {tally.resumed} runs gone on with to their end, in {(time.monotonic() - began) / 60:.0f} min"
    )
    click.echo(
        f"hangs {tally.hangs}, lost checkpoints {tally.lost}, resumes that differ {tally.differing}, warnings not heeded {tally.untold}"
    )
    click.echo(
        f"longest time from fault to the job's end: {max(tally.slowest.values()):.1f} s (stalls are noticed after {STALL_SECONDS} s)"
    )
    sys.exit(bool(tally.hangs or tally.lost or tally.differing or tally.untold))


if __name__ == "__main__":
    main()
