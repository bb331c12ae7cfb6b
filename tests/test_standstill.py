"""Jobs in which one rank stops, runs out of something, or was started otherwise than the rest: under real mpirun."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loft_hpc
from loft_hpc.runs.run import Run

from launching import launch, loft, told
from test_faults import FAULTS, FAULTY, LONG, alive, rank_processes, start_training, wait_for_checkpoint

sys.path.insert(0, str(FAULTS))
from faulty import EXCEPTION, HANG

CHECKPOINTS = ("--checkpoint-every", "10it", "--local-iterations", "5")


def end_of(process: subprocess.Popen, pids: list[int], seconds: float = 90) -> str:
    """What the job wrote to standard error. Fails unless it ends by itself, on all ranks, with a failure."""
    try:
        _, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and alive(pids) == []
    return err


def lines_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("loft: ")]


@pytest.mark.parametrize(("strategy", "victim"), [("loft", 0), ("gpipe", 1)])
def test_a_stopped_rank_ends_the_job_and_is_named(tmp_path, strategy, victim):
    """SIGSTOP, as a machine that swaps, a link that is down or a debugger: MPI and Horovod wait for ever."""
    own = CHECKPOINTS if strategy == "loft" else ("--split", "balanced")
    options = (*LONG[1:], "--strategy", strategy, *own, "--stall-seconds", "4")
    process = wait_for_checkpoint(start_training(2, tmp_path / "run", *options, until="epoch"), tmp_path / "run")
    pids = rank_processes(process)
    os.kill(pids[victim], signal.SIGSTOP)
    lines = lines_of(end_of(process, pids))
    assert any(f"rank {victim} has not been heard of for" in line and "--stall-seconds" in line for line in lines), lines
    assert Run.open(tmp_path / "run").checkpoints.newest_step(pytest.fail)


def test_a_rank_that_stops_while_it_leaves_holds_nobody(tmp_path):
    """bin/torture found it: the training was done, and the others waited in MPI's end for ever."""
    stops = "import atexit, os, signal; from loft_hpc.cli.main import main; atexit.register(os.kill, os.getpid(), signal.SIGSTOP); main()"
    common = (
        "pretrain",
        "--model",
        "resnet20",
        "--epochs",
        "1",
        "--batch-size",
        "400",
        "--statistics-batches",
        "1",
        "--run",
        str(tmp_path / "run"),
    )
    result = launch(1, "loft", *common, ":", "-np", "1", sys.executable, "-c", stops, *common, seconds=150)
    assert result.code != 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"


def test_a_rank_that_does_not_get_on_is_named_with_its_place(tmp_path):
    """It lives, and answers, but a call does not come back."""
    process = start_training(2, tmp_path / "run", *LONG[1:], "--stall-seconds", "8", command=FAULTY)
    pids = rank_processes(process)
    os.kill(pids[1], HANG)
    first = lines_of(end_of(process, pids))[0]
    assert first.startswith("loft: rank 1 on ") and re.search(r"does not get on in \w+/\w+\.py", first), first


def test_an_exception_on_one_rank_ends_the_job_with_all_that_helps_to_find_it(tmp_path):
    process = wait_for_checkpoint(start_training(2, tmp_path / "run", *LONG[1:], *CHECKPOINTS, command=FAULTY), tmp_path / "run")
    pids = rank_processes(process)
    os.kill(pids[1], EXCEPTION)
    err = end_of(process, pids)
    assert "loft: rank 1: unexpected failure" in err and "ZeroDivisionError: injected" in err
    assert Run.open(tmp_path / "run").checkpoints.newest_step(pytest.fail)


def test_a_rank_without_memory_ends_the_job(tmp_path):
    process = wait_for_checkpoint(start_training(2, tmp_path / "run", *LONG[1:], *CHECKPOINTS), tmp_path / "run")
    pids = rank_processes(process)
    used = int(Path(f"/proc/{pids[1]}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pids[1], resource.RLIMIT_AS, (used, used))
    end_of(process, pids)
    assert Run.open(tmp_path / "run").checkpoints.newest_step(pytest.fail)


def test_a_full_disk_loses_nothing_that_was_there(tmp_path):
    """A file system of three megabytes, which a third checkpoint does not fit on any more."""
    disk, path = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        options = ("--model", "resnet20", "--epochs", "50", "--snapshot-every", "0", "--local-iterations", "5", "--keep-checkpoints", "50",
                   "--checkpoint-every", "5it", "--batch-size", "32")  # fmt: skip
        result = loft("pretrain", *options, "--run", path, ranks=2)
        assert result.code == 1
        (line,) = told(result)
        assert "No space left on device" in line and "free space" in line and "Traceback" not in result.err
        run = Run.open(path)
        steps = sorted(int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit())
        assert steps and run.checkpoints.newest_step(pytest.fail) == steps[-1]
        for old in steps[:-1]:
            shutil.rmtree(path / "checkpoints" / f"{old:06d}")
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        process = subprocess.Popen(["loft", "pretrain", "--run", str(path), "--resume"], stdout=subprocess.PIPE, text=True)
        for text in process.stdout:
            if text.startswith("epoch"):
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 85
        assert json.loads((path / "run.json").read_text())["status"] == "interrupted"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def other_code(tmp_path: Path) -> list[str]:
    """The environment of a rank that finds a checkout of its own, in which a comment is another."""
    shutil.copytree(Path(loft_hpc.__file__).parent, tmp_path / "checkout" / "loft_hpc")
    with open(tmp_path / "checkout" / "loft_hpc" / "seeds.py", "a") as file:
        file.write("# other\n")
    return ["env", f"PYTHONPATH={tmp_path / 'checkout'}"]


@pytest.mark.parametrize(
    ("otherwise", "told_of"),
    [
        (["--lr", "0.2"], "--lr 0.05, rank 1 with 0.2"),
        (["--strategy", "data-parallel"], "--strategy loft, rank 1 with data-parallel"),
        (["--dataset", "textures"], "--dataset digits, rank 1 with textures"),
        (["--resume"], "--resume False, rank 1 with True"),
        (["--engine", "mpi4py"], "--engine auto, rank 1 with --engine mpi4py"),
        ("code", "loft-hpc "),
    ],
)
def test_ranks_that_were_started_otherwise_are_found_at_the_start(tmp_path, otherwise, told_of):
    before = other_code(tmp_path) if otherwise == "code" else []
    more = [] if otherwise == "code" else otherwise
    common = ["loft", "pretrain", "--model", "resnet20", "--epochs", "1", "--run", str(tmp_path / "run")]
    result = launch(1, *common, ":", "-np", "1", *before, *common, *more, seconds=90)
    assert result.code != 0
    (line,) = told(result)
    assert line.startswith("loft: rank 0 was started with ") and told_of in line and line.endswith("start all ranks alike"), line
    assert not (tmp_path / "run").exists()


def test_other_images_on_one_rank_are_found_at_the_start(tmp_path, monkeypatch):
    """textures come out of scikit-image's folder; here one rank has one image of another make."""
    import skimage.data

    source = Path(skimage.data.__file__).parent.parent
    other = tmp_path / "packages" / "skimage"
    shutil.copytree(source, other, symlinks=True)
    shutil.copy(other / "data" / "grass.png", other / "data" / "gravel.png")
    common = ["loft", "pretrain", "--model", "resnet20", "--epochs", "1", "--dataset", "textures", "--run", str(tmp_path / "run")]
    result = launch(
        1, *common, ":", "-np", "1", "env", f"PYTHONPATH={other.parent}:{os.environ.get('PYTHONPATH', '')}", *common, seconds=120
    )
    assert result.code != 0
    (line,) = told(result)
    assert "the images of textures, SHA-256" in line, line
    assert not (tmp_path / "run").exists()


def test_signs_of_life_do_not_end_a_job_that_slept_as_a_whole(tmp_path):
    """`scontrol suspend` stops all ranks, and lets them go on later."""
    process = start_training(3, tmp_path / "run", *LONG[1:], *CHECKPOINTS, "--stall-seconds", "4")
    pids = rank_processes(process)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
        for _ in range(100):
            time.sleep(0.2)
            assert process.poll() is None, process.communicate()
            if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") > lines + 5:
                return
        pytest.fail("the job did not go on")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
