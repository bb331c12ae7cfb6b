"""Going on from a checkpoint, wherever it was written, over real ranks: bitwise, ledger and log included."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from loft_hpc.cli.main import INTERRUPTED, run
from loft_hpc.cli.progress import Progress
from loft_hpc.files import read_tensors
from loft_hpc.jobs.commcost import run_cost
from loft_hpc.runs.run import Run
from loft_hpc.training.buffers import ParameterBuffer

from check_emergence import mark_as_running

SIZES = (1, 3)
# 11 steps an epoch
SMALL = ["--model", "resnet20", "--widen", "0.5", "--batch-size", "128", "--epochs", "2", "--statistics-batches", "2", "--check-ranks"]
STRATEGIES = {
    "loft": ["--local-iterations", "3"],
    "loft, rarely averaged": ["--local-iterations", "2", "--exchange", "alltoall", "--transport-dtype", "bfloat16", "--average-every", "3",
                              "--momentum-across-rounds", "carry", "--snapshot-every", "7it"],
    "data-parallel": ["--strategy", "data-parallel", "--snapshot-every", "5it"],
    "gpipe": ["--strategy", "gpipe", "--split", "balanced"],
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory) -> Path:
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("resume")) if world.rank == 0 else None))


@pytest.fixture(autouse=True)
def in_step(world):
    world.barrier()
    yield
    world.barrier()


def pretrain(world, path: Path, *options: str) -> Path:
    """A run by every rank, to its end."""
    if not path.exists():
        world.barrier()
        assert run(["pretrain", *SMALL, *options, "--run", str(path)]) == 0
    world.barrier()
    return path


def several_ranks_alone(world, strategy: str) -> None:
    """Skips what is the same as another strategy where one rank exchanges nothing."""
    if world.size == 1 and strategy in ("loft, rarely averaged", "data-parallel"):
        pytest.skip("one rank alone exchanges nothing")


def whole(world, folder: Path, strategy: str) -> Path:
    return pretrain(world, folder / f"whole {strategy}", *STRATEGIES[strategy])


def same(one: Path, other: Path) -> None:
    """Networks, losses and accuracies, to the last bit; and bytes as the formula says."""
    first, second = (read_tensors(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for event, fields in (("epoch", ("epoch", "step", "loss")), ("eval", ("step", "accuracy", "test_loss")), ("round", ("step", "loss")),
                          ("snapshot", ("step", "distance_to_previous"))):  # fmt: skip
        lines = [[[line.get(name) for name in fields] for line in Run.open(path).events(event)] for path in (one, other)]
        assert lines[0] == lines[1]
    for path in (one, other):
        for row in run_cost(path).rows:
            assert row.equal, (path, row)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_from_any_step(world, folder, strategy):
    """A checkpoint after every step (every settled round) decides nothing, and each of them is enough to go on from."""
    several_ranks_alone(world, strategy)
    every = pretrain(world, folder / f"every {strategy}", *STRATEGIES[strategy], "--checkpoint-every", "1it", "--keep-checkpoints", "100")
    same(whole(world, folder, strategy), every)
    steps = sorted(int(entry.name) for entry in (every / "checkpoints").iterdir())
    assert len(steps) >= 4
    for step in (steps[0], steps[len(steps) // 2], steps[-2]) if strategy == "loft" else (steps[len(steps) // 2],):
        copy = folder / f"{strategy} from {step}"
        if world.rank == 0:
            shutil.copytree(every, copy)
            mark_as_running(copy)
            for later in steps:
                if later > step:
                    shutil.rmtree(copy / "checkpoints" / f"{later:06d}")
        world.barrier()
        assert run(["pretrain", "--run", str(copy), "--resume"]) == 0
        world.barrier()
        same(every, copy)


def when_step(monkeypatch, step: int, action) -> None:
    """Do something on this rank once that step is done."""
    advanced = Progress.advanced

    def watched(self: Progress, done: int, loss: float) -> None:
        advanced(self, done, loss)
        if done >= step:
            action()

    monkeypatch.setattr(Progress, "advanced", watched)


@pytest.mark.parametrize(("strategy", "step"), [("loft", 1), *((strategy, 9) for strategy in STRATEGIES), ("loft", 11)])
def test_one_rank_told_to_end_ends_all_at_one_step(world, folder, monkeypatch, capsys, strategy, step):
    several_ranks_alone(world, strategy)
    path = folder / f"told {strategy} {step}"
    with monkeypatch.context() as patch:
        if world.rank == world.size - 1:
            when_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert run(["pretrain", *SMALL, *STRATEGIES[strategy], "--run", str(path)]) == INTERRUPTED
    world.barrier()
    description = json.loads((path / "run.json").read_text())
    at = description["interrupted_at_step"]
    assert description["status"] == "interrupted" and step < at < 22
    assert sorted((path / "checkpoints").iterdir())[-1].name == f"{at:06d}"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loft: ")]
    assert told == ([f"loft: {path}: preempted, checkpoint written after step {at}; go on with --resume"] if world.rank == 0 else [])
    assert run(["pretrain", "--run", str(path), "--resume"]) == 0
    world.barrier()
    same(whole(world, folder, strategy), path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_is_named(world, folder, capsys, monkeypatch, strategy):
    """Rank and step; and the checkpoint before it is what it was."""
    several_ranks_alone(world, strategy)
    path = folder / f"diverged {strategy}"
    options = [*STRATEGIES[strategy], "--checkpoint-every", "1it"]
    with monkeypatch.context() as patch:
        if world.rank == world.size - 1:
            when_step(patch, 8, _spoil)
        assert run(["pretrain", *SMALL, *options, "--run", str(path)]) == 1
    world.barrier()
    err = capsys.readouterr().err
    description = json.loads((path / "run.json").read_text())
    assert description["status"] == "failed"
    if world.rank == 0:
        assert err.splitlines() == [f"loft: {description['failure']}"] and "finite" in err
    run_, steps = Run.open(path), []
    newest = run_.checkpoints.newest_step(steps.append)
    assert newest is None or all(tensor.isfinite().all() for tensor in run_.checkpoints.read(newest).tensors.values())
    assert not steps
    assert run(["pretrain", "--run", str(path), "--resume"]) == 0
    world.barrier()
    same(whole(world, folder, strategy), path)


def _spoil() -> None:
    for buffer in _buffers():
        buffer.values[:1] = float("nan")


def _flip() -> None:
    for buffer in _buffers():
        buffer.values.view(torch.int32)[:1] ^= 1 << 20


def _buffers() -> list[ParameterBuffer]:
    """Of the running training (and of those before it, which nobody looks at any more)."""
    return [thing for thing in gc.get_objects() if isinstance(thing, ParameterBuffer)]


def test_ranks_that_drift_apart_are_found(world, folder, monkeypatch, capsys):
    if world.size == 1:
        pytest.skip("one rank alone cannot differ")
    path, strange = folder / "drifted", world.size - 1
    with monkeypatch.context() as patch:
        if world.rank == strange:
            when_step(patch, 8, _flip)
        assert run(["pretrain", *SMALL, *STRATEGIES["data-parallel"], "--run", str(path)]) == 1
    world.barrier()
    failure = json.loads((path / "run.json").read_text())["failure"]
    assert failure.startswith(f"what all ranks should hold alike differs on rank {strange}:")
    assert (world.rank == 0) == (failure in capsys.readouterr().err)


@pytest.mark.parametrize("strategy", ["loft", "data-parallel", "gpipe"])
def test_an_extended_run_is_the_longer_one(world, folder, strategy):
    """At a constant rate, to the last bit; the ledger's formula knows of the end in its middle and of checkpoints that came oftener."""
    options = [*STRATEGIES[strategy], "--schedule", "constant", "--warmup", "3it", "--seed", "4", "--snapshot-every", "1ep"]
    if strategy == "loft":
        options += ["--local-iterations", "11", "--exchange", "alltoall"]  # rounds that end where the epoch does
    longer = pretrain(world, folder / f"longer {strategy}", *options)
    path = pretrain(world, folder / f"extended {strategy}", *options, "--epochs", "1")
    assert run(["pretrain", "--run", str(path), "--resume", "--extend-to", "2", "--checkpoint-every", "4it"]) == 0
    world.barrier()
    same(longer, path)
    description = Run.open(path).description
    assert description["total_steps"] == 22 and description["resumed"][0]["results_before"]["steps"] == 11
    assert description["resumed"][0]["changed"]["checkpoint_every"] == {"before": "1ep", "now": "4it"}


def test_a_broken_checkpoint_is_told_and_the_one_before_is_used(world, folder, capsys):
    every, copy = folder / "every loft", folder / "torn"
    steps = sorted(entry.name for entry in (every / "checkpoints").iterdir())
    if world.rank == 0:
        shutil.copytree(every, copy)
        mark_as_running(copy)
        state = copy / "checkpoints" / steps[-1] / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])
    world.barrier()
    capsys.readouterr()
    assert run(["pretrain", "--run", str(copy), "--resume"]) == 0
    out, err = capsys.readouterr()
    if world.rank == 0:
        assert f"going on at step {int(steps[-2])} of 22" in out
        (line,) = err.splitlines()
        assert line.startswith("loft: note: the newest checkpoint is broken, an earlier one is used: ") and steps[-1] in line
    world.barrier()
    same(every, copy)
