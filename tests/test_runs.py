"""Files: atomic, checksummed, and one line when they are not what they should be."""

import json
import os

import pytest
import torch

from loft_hpc.comm.ledger import Entry, Ledger
from loft_hpc.errors import LoftError
from loft_hpc.files import read_json, read_tensors, write_atomically, write_tensors
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.run import Run, claim_default_path

from tiny import tiny

TENSORS = {
    "weight": torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
    "count": torch.tensor(7),
    "mask": torch.tensor([1, 0], dtype=torch.uint8),
    "empty": torch.zeros(0),
}


def new_run(path) -> Run:
    return Run.create(path, "pretrain", {"seed": 1}, {"architecture": tiny().to_json()})


def test_tensors_survive(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in read)


def test_every_truncation_and_every_flipped_byte_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    broken = [content[:length] for length in range(0, len(content), 37)]
    for place in range(0, len(content), 11):
        altered = bytearray(content)
        altered[place] ^= 0x10
        broken.append(bytes(altered))
    for bad in broken:
        path.write_bytes(bad)
        with pytest.raises(LoftError) as told:
            read_tensors(path)
        assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoftError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", "[1]", "nonsense", "[" * 100_000])
def test_broken_json_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(LoftError) as told:
        read_json(tmp_path / "run.json")
    assert "\n" not in str(told.value)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    new_run(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(LoftError, match="--resume"):
        new_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(LoftError, match="never overwritten"):
        new_run(tmp_path / "other")
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_default_names_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = claim_default_path("resnet20", "digits", "loft", 4)
    assert first.is_dir()
    new_run(first)
    second = claim_default_path("resnet20", "digits", "loft", 4)
    assert first != second and second.name.startswith("resnet20-digits-loft+4-")


def test_run_ends_with_a_status(tmp_path):
    run = new_run(tmp_path / "done")
    assert Run.open(run.path).description["status"] == "running"
    run.finish("done", {"accuracy": 0.5})
    assert Run.open(run.path).description["results"] == {"accuracy": 0.5}
    with pytest.raises(LoftError), run.failures_recorded():
        raise LoftError("the disk is gone")
    assert Run.open(run.path).description["status"] == "failed"
    assert Run.open(run.path).description["failure"] == "the disk is gone"


def test_checkpoints_keep_the_last_and_fall_back_from_a_torn_one(tmp_path):
    run = new_run(tmp_path / "run")
    ledger = Ledger()
    ledger.record("allreduce", "shared", Entry(1, 2, 3, 4, 5, 6))
    assert run.checkpoints.newest_step(print) is None
    for step in (999_984, 999_992, 1_000_000):  # sorted as numbers, not as names
        run.checkpoints.write(Checkpoint(step, {"a": torch.full((2,), float(step))}, [ledger], {"round": 3}), keep=2)
    assert sorted(folder.name for folder in (run.path / "checkpoints").iterdir()) == ["1000000", "999992"]
    newest = run.checkpoints.read(run.checkpoints.newest_step(print))
    assert (newest.step, newest.progress, newest.tensors["a"].tolist()) == (1_000_000, {"round": 3}, [1e6, 1e6])
    assert newest.ledgers == [ledger]
    torn = run.path / "checkpoints" / "1000000" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (run.path / "checkpoints" / ".1000008.123").mkdir()  # a writer was killed
    assert run.checkpoints.newest_step(print) == 999_992
    assert not (run.path / "checkpoints" / ".1000008.123").exists()
    (run.path / "checkpoints" / "999992" / "progress.json").write_text("{}")
    with pytest.raises(LoftError, match="nothing to resume from"):
        run.checkpoints.newest_step(print)


def test_a_run_that_goes_on_keeps_no_broken_checkpoint_in_the_place_of_a_good_one(tmp_path):
    """bin/torture found it: two torn in a row, the first one still counted among those kept, left nothing to go on from."""
    checkpoints = new_run(tmp_path / "run").checkpoints

    def tear(step: int) -> None:
        state = tmp_path / "run" / "checkpoints" / f"{step:06d}" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])

    def write(step: int) -> None:
        checkpoints.write(Checkpoint(step, {"a": torch.zeros(2)}, [Ledger()], {}), keep=2)

    write(40)
    write(45)
    tear(45)
    step = checkpoints.newest_step(print)
    assert step == 40
    Run.open(tmp_path / "run").forget_after(step)
    write(50)
    tear(50)
    assert checkpoints.newest_step(print) == 40


def test_the_log_forgets_what_is_done_again_and_what_was_torn(tmp_path):
    run = new_run(tmp_path / "run")
    for step in (8, 16, 24):
        run.log("round", step=step)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write("\0\0\n" + '{"event": "round", "step": 8')
    run.forget_after(16)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [8, 16]


def test_ledger_file(tmp_path):
    run, ledgers = new_run(tmp_path / "run"), [Ledger(), Ledger()]
    for rank, ledger in enumerate(ledgers):
        ledger.record("allgather", "partitioned", Entry(1, 10 * rank, 20, 30, 40, 50))
    run.write_ledger(ledgers)
    assert run.read_ledgers() == ledgers
    fields = json.loads((run.path / "ledger.json").read_text())
    assert fields["total"]["allgather"]["partitioned"]["payload_sent_bytes"] == 10
    (run.path / "ledger.json").write_text('{"ranks": [{"allgather": {"gossip": {}}}]}')
    with pytest.raises(LoftError, match="no ledger"):
        run.read_ledgers()


@pytest.mark.parametrize("content", [None, "{}", '{"configuration": 1, "architecture": {}}'])
def test_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(LoftError):
        Run.open(tmp_path)


def test_tensors_lie_under_any_name(tmp_path):
    """File names are bytes: one that is not UTF-8 is written and read as any other."""
    path = tmp_path / "caf\udce9" / "model.safetensors"
    write_tensors(path, {"weight": torch.ones(3)})
    assert torch.equal(read_tensors(path)["weight"], torch.ones(3))
