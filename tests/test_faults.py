"""Jobs that go wrong, under real mpirun: every one ends on all ranks within seconds, with a non-zero exit code and a line that says why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loft_hpc.files import read_tensors
from loft_hpc.runs.run import Run

from launching import launch, launch_environment, loft, told

# A training that would go on for minutes if nobody ended it.
LONG = ("pretrain", "--model", "resnet20", "--epochs", "500")
KILLED = ("--model", "resnet20", "--widen", "0.5", "--epochs", "4", "--batch-size", "64", "--snapshot-every", "0")


FAULTS = Path(__file__).parent.parent / "bin" / "faults"
FAULTY = (sys.executable, str(FAULTS / "faulty.py"))
"""The loft command, in which signals make something go wrong."""


def start_training(ranks: int, path: Path, *options: str, until: str = "round", command: tuple[str, ...] = ("loft",)) -> subprocess.Popen:
    """Start a training, a long one by default, and wait until it has done a round (or has logged another event)."""
    process = subprocess.Popen(
        ["mpirun", "-np", str(ranks), *command, *(("pretrain", *options) if options else LONG), "--run", str(path)], env=launch_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    log, end = path / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count(f'"{until}"') < 1:
        if process.poll() is not None or time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the training did not start: {process.communicate()}")
        time.sleep(0.02)
    return process


def wait_for_checkpoint(process: subprocess.Popen, path: Path) -> subprocess.Popen:
    """The training, once there is a checkpoint to go on from."""
    while not list((path / "checkpoints").glob("0*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def rank_processes(process: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks, by rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {}
    for child in children:
        environment = dict(item.split("=", 1) for item in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in item)
        if "OMPI_COMM_WORLD_RANK" in environment:
            ranks[int(environment["OMPI_COMM_WORLD_RANK"])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def alive(pids: list[int]) -> list[int]:
    def is_alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job(tmp_path, victim):
    process = start_training(3, tmp_path / "run")
    pids = rank_processes(process)
    assert len(pids) == 3
    os.kill(pids[victim], signal.SIGKILL)
    try:
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert alive(pids) == []
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_in_the_middle_of_a_pipeline_ends_the_job(tmp_path, victim):
    """The others wait for its messages in MPI itself."""
    path = tmp_path / "run"
    options = ("--strategy", "gpipe", "--model", "resnet20", "--split", "balanced", "--epochs", "500", "--evaluate-every", "500")
    process = start_training(3, path, *options, until="epoch")
    pids = rank_processes(process)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    try:
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and time.monotonic() - began < 15
    assert alive(pids) == []


def test_a_mistake_on_one_rank_of_a_pipeline_ends_the_job(tmp_path):
    """Rank 0 alone reads the images, and cannot read one; rank 1 waits for its activations."""
    from test_data import make_folder

    make_folder(tmp_path / "data")
    common = ("--strategy", "gpipe", "--split", "balanced", "--model", "resnet20", "--dataset", "imagefolder", "--image-size", "32",
              "--batch-size", "4", "--micro-batches", "2", "--epochs", "500", "--evaluate-every", "500", "--statistics-batches", "1",
              "--statistics-batch", "2", "--loader-workers", "0", "--data-dir", tmp_path / "data", "--run", tmp_path / "run")  # fmt: skip
    (tmp_path / "data" / "train" / "cat" / "0.png").write_bytes(b"no image")
    result = loft("pretrain", *common, ranks=2, seconds=90)
    assert result.code != 0
    assert "0.png cannot be read" in result.err and "Traceback" not in result.err


def test_a_rank_that_alone_meets_a_mistake_says_so_and_ends_the_job(tmp_path):
    """Rank 1 is given a folder without the data, while rank 0 goes on and waits for it in a raw MPI call."""
    from test_data import make_folder

    make_folder(tmp_path / "data")
    common = ("pretrain", "--model", "resnet20", "--dataset", "imagefolder", "--image-size", "32", "--batch-size", "4", "--epochs", "500",
              "--loader-workers", "0", "--run", str(tmp_path / "run"))  # fmt: skip
    began = time.monotonic()
    good, bad = (("loft", *common, "--data-dir", str(tmp_path / folder)) for folder in ("data", "nowhere"))
    result = launch(1, *good, ":", "-np", "1", *bad, seconds=60)
    assert result.code != 0
    lines = told(result)
    assert len(lines) == 1 and lines[0].startswith("loft: rank 1: no imagefolder in") and "nowhere" in lines[0], result.err
    assert "Traceback" not in result.err
    assert time.monotonic() - began < 45


def test_an_image_that_breaks_during_training_ends_the_job(tmp_path):
    """The other rank waits in a Horovod collective by then."""
    from test_data import make_folder

    for folder in ("data", "broken"):
        make_folder(tmp_path / folder)
    (tmp_path / "broken" / "train" / "cat" / "0.png").write_bytes(b"no image")
    common = ("pretrain", "--model", "resnet20", "--dataset", "imagefolder", "--image-size", "32", "--batch-size", "4", "--epochs", "500",
              "--statistics-batches", "1", "--statistics-batch", "2", "--loader-workers", "0", "--run", str(tmp_path / "run"))  # fmt: skip
    good, bad = (("loft", *common, "--data-dir", str(tmp_path / folder)) for folder in ("data", "broken"))
    result = launch(1, *good, ":", "-np", "1", *bad, seconds=90)
    assert result.code != 0
    assert "loft: rank 1: the image" in result.err and "0.png cannot be read" in result.err


def test_worlds_of_one_rank_are_refused(tmp_path):
    """Ranks that cannot see one another, as under another MPI's launcher, must not train N times in silence."""
    hidden = [
        argument
        for name in (
            "PMIX_NAMESPACE",
            "PMIX_RANK",
            "PMIX_SERVER_URI41",
            "PMIX_SERVER_URI4",
            "PMIX_SERVER_URI3",
            "PMIX_SERVER_URI2",
            "PMIX_SERVER_URI21",
        )
        for argument in ("-u", name)
    ]
    result = launch(
        2, "env", *hidden, "loft", "pretrain", "--model", "resnet20", "--epochs", "1", "--run", str(tmp_path / "run"), seconds=60
    )
    assert result.code == 2
    lines = told(result)
    assert len(lines) == 1 and "announced 2 ranks, but MPI sees a world of 1" in lines[0]
    assert not (tmp_path / "run").exists()


def test_interrupted_training_can_be_resumed(tmp_path):
    process = wait_for_checkpoint(start_training(2, tmp_path / "run"), tmp_path / "run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    description = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(description)["status"] in ("running", "interrupted")  # as mpirun left the ranks time to write a checkpoint or not
    result = loft("pretrain", "--run", tmp_path / "run", "--resume", "--lr", "0.3", ranks=2, seconds=60)
    assert result.code == 1 and "was started with --lr 0.05" in told(result)[0]
    assert (tmp_path / "run" / "run.json").read_text() == description  # untouched by the refusal


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert loft("pretrain", *KILLED, "--run", path, ranks=2).code == 0
    return path


@pytest.mark.parametrize("after", ["first round", "first checkpoint"])
def test_a_killed_run_resumes_and_ends_as_an_undisturbed_one(tmp_path, whole, after):
    broken = tmp_path / "broken"
    process = start_training(2, broken, *KILLED)
    if after == "first checkpoint":
        wait_for_checkpoint(process, broken)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (broken / "model.safetensors").exists()
    result = loft("pretrain", "--run", broken, "--resume", ranks=2)
    assert result.code == 0, result.err
    one, other = (read_tensors(path / "model.safetensors") for path in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines() if '"round"' in line]
    assert steps == sorted(set(steps)) and steps[-1] == 88  # no round is logged twice
    exchanged = [Run.open(path).read_ledgers()[1].entry("allgather", "partitioned") for path in (whole, broken)]
    assert exchanged[0] == exchanged[1]


def test_threads_set_by_hand_on_one_rank_alone_hang_nobody(tmp_path):
    common = ("loft", "pretrain", "--model", "resnet20", "--epochs", "1", "--run", str(tmp_path / "run"))
    result = launch(1, "env", "OMP_NUM_THREADS=1", *common, ":", "-np", "1", *common, seconds=60)
    assert result.code == 0, result.err


def test_a_line_per_epoch_and_no_bar_when_nobody_watches(tmp_path):
    result = loft("pretrain", "--model", "resnet20", "--epochs", "2", "--run", tmp_path / "run", ranks=2, seconds=120)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1] == f"run: {tmp_path / 'run'}"
    assert [line.split("   ")[0] for line in lines[2:4]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[0].startswith("pretraining resnet20 on digits with loft over 2 ranks (")
    assert lines[4].startswith("test accuracy of the merged network: ") and lines[5] == f"run: {tmp_path / 'run'}"
    assert "\r" not in result.out and "\x1b" not in result.out


def test_doctor_and_help_work_without_mpirun():
    result = loft("doctor")
    assert result.code == 0
    assert [line.split()[1] for line in result.out.splitlines()][:5] == ["torch", "torchvision", "MPI", "mpirun", "Horovod"]
    assert loft("pretrain", "--help").out.startswith("Usage: loft pretrain")
