"""Jobs that are preempted, run twice, or go on with other ranks: under real mpirun."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from loft_hpc.cli.main import run
from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors
from loft_hpc.runs.lock import RunLock
from loft_hpc.runs.run import Run
from loft_hpc.training.interruption import WARNINGS, Interruption

from launching import launch_environment, loft, told
from test_faults import start_training

SMALL = (
    "--model",
    "resnet20",
    "--widen",
    "0.5",
    "--epochs",
    "4",
    "--batch-size",
    "64",
    "--statistics-batches",
    "2",
    "--snapshot-every",
    "0",
)
STRATEGIES = {
    "loft": ("--local-iterations", "5"),
    "loft, rarely averaged": ("--local-iterations", "3", "--exchange", "alltoall", "--transport-dtype", "bfloat16", "--average-every", "3"),
    "data-parallel": ("--strategy", "data-parallel"),
    "gpipe": ("--strategy", "gpipe", "--split", "balanced"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs, by strategy, made when first asked for."""
    made = {}

    def run(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            assert loft("pretrain", *SMALL, *STRATEGIES[name], "--run", made[name], ranks=2).code == 0
        return made[name]

    return run


@pytest.mark.parametrize(
    ("strategy", "warning"),
    [("loft, rarely averaged", signal.SIGUSR1), ("gpipe", signal.SIGUSR2)],  # the other strategies, in one process: check_resume.py
)
def test_a_warning_ends_all_ranks_at_one_step_and_nothing_is_lost(tmp_path, whole, strategy, warning):
    """As Slurm sends it before a preemption: a checkpoint, exit code 85, and a resumed run that ends as an undisturbed one."""
    path = tmp_path / "run"
    until = "round" if strategy.startswith("loft") else "epoch"
    process = start_training(2, path, *SMALL, *STRATEGIES[strategy], until=until)
    time.sleep(0.3)
    process.send_signal(warning)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    lines = [line for line in err.splitlines() if line.startswith("loft: ")]
    assert len(lines) == 1 and "checkpoint written after step" in lines[0] and "Traceback" not in err
    description = json.loads((path / "run.json").read_text())
    assert description["status"] == "interrupted" and description["interrupted_at_step"] < description["total_steps"]
    assert (path / "checkpoints" / f"{description['interrupted_at_step']:06d}").is_dir()
    result = loft("pretrain", "--run", path, "--resume", ranks=2)
    assert result.code == 0, result.err
    assert f"going on at step {description['interrupted_at_step']} of" in result.out
    one, other = (read_tensors(folder / "model.safetensors") for folder in (whole(strategy), path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[(event["step"], event["loss"]) for event in Run.open(folder).events("epoch")] for folder in (whole(strategy), path)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP])
def test_every_warning_ends_a_training_with_a_checkpoint(tmp_path, warning):
    """In this process, as soon as it has trained a round; a warning that nobody notes is caught here."""
    path, missed = tmp_path / "run", []
    before = signal.signal(warning, lambda number, frame: missed.append(number))

    def warn() -> None:
        while not (path / "metrics.jsonl").exists() or '"round"' not in (path / "metrics.jsonl").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), warning)

    teller = threading.Thread(target=warn)
    teller.start()
    try:
        code = run(["pretrain", *SMALL, "--local-iterations", "1", "--run", str(path)])
    finally:
        teller.join()
        signal.signal(warning, before)
    assert (code, missed) == (85, [])
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"


def test_warnings_count_from_the_first_moment_to_the_last(tmp_path):
    """All of them, again and again: before torch is loaded, while it is, in the training, and while the process leaves."""
    process = start_alone(tmp_path / "run")
    status, caught = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGHUP - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & caught:
        assert process.poll() is None
    while process.poll() is None:
        for warning in WARNINGS:
            process.send_signal(warning)
        time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 85 and "checkpoint written after step 1;" in err, out + err


def test_mpi_does_not_take_the_closing_of_a_terminal_for_itself(tmp_path):
    """Open MPI sets a handler of its own for HUP as it starts, in place of ours."""
    process, log = start_alone(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or '"round"' not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 85, out + err


def start_alone(path: Path) -> subprocess.Popen:
    """A training without a launcher, in a process of its own that ignores nothing."""
    command = [sys.executable, "-m", "loft_hpc", "pretrain", *SMALL, "--local-iterations", "1", "--run", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_whoever_started_the_command_ignores_stays_ignored(number):
    """nohup ignores HUP, and a script's shell INT for what it starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
        assert not interruption.requested
    finally:
        signal.signal(number, before)


def test_two_jobs_cannot_write_one_run(tmp_path):
    path = tmp_path / "run"
    process = start_training(2, path)
    try:
        result = loft("pretrain", "--run", path, "--resume", ranks=2, seconds=60)
        assert result.code == 1
        (line,) = told(result)
        assert "is being written by process" in line and "--run" in line
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # the lock goes with its owner, a rank that notices soon that its mpirun is gone
    lock, end = RunLock(path), time.monotonic() + 30
    while True:
        try:
            lock.acquire()
            return lock.release()
        except LoftError:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.parametrize(("strategy", "ranks"), [("loft", 3), ("loft", 1), ("data-parallel", 3)])
def test_another_number_of_ranks_goes_on(tmp_path, strategy, ranks):
    path = tmp_path / "run"
    process = start_training(2, path, *SMALL, *STRATEGIES[strategy], until="epoch")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 85
    result = loft("pretrain", "--run", path, "--resume", ranks=ranks)
    assert result.code == 0, result.err
    assert f"this run had 2 ranks and has {ranks} now" in result.out
    description = json.loads((path / "run.json").read_text())
    assert description["status"] == "done" and description["world_size"] == ranks and description["results"]["accuracy"] > 0.3
    ledgers = Run.open(path).read_ledgers()
    assert len(ledgers) == ranks and sum(ledger.payload_bytes[0] for ledger in ledgers) > 0


def test_a_pipeline_goes_on_with_as_many_ranks_alone(tmp_path):
    path = tmp_path / "run"
    process = start_training(3, path, *SMALL, *STRATEGIES["gpipe"], until="epoch")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    result = loft("pretrain", "--run", path, "--resume", ranks=2)
    assert result.code == 1 and "was started with 3 ranks" in told(result)[0]
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"


def test_a_check_that_is_told_to_end_goes_on(tmp_path):
    """Some of its ranks may be done with their share when the others are told."""
    path = tmp_path / "run"
    assert run(["pretrain", *SMALL, *STRATEGIES["data-parallel"], "--run", str(path)]) == 0
    assert run(["prune", str(path), "--ratio", "0.5"]) == 0
    ticket = path / "tickets" / "magnitude-l2-0.5"
    command = ("check", str(ticket), "--seeds", "1", "--epochs", "4", "--statistics-batches", "2", "--format", "json")
    process = subprocess.Popen(
        ["mpirun", "-np", "2", "loft", *command], env=launch_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list((ticket / "checks").glob("default/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    lines = [line for line in err.splitlines() if line.startswith("loft: ")]
    assert len(lines) == 1 and "give the same command again" in lines[0] and "Traceback" not in err
    result = loft(*command, ranks=2)
    assert result.code == 0 and len(json.loads(result.out[result.out.index("{") :])["variants"]) == 6, result.err
