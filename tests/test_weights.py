"""`loft pretrain --weights`: the same run from a run's own start, torchvision's networks, and files that do not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from loft_hpc.files import read_tensors
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import build

from hostile import Told, run
from test_data import make_folder

SMALL = ("--model", "resnet20", "--widen", "0.25", "--batch-size", "512", "--statistics-batches", "1", "--device", "cpu", "--epochs", "1")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "run"
    assert run("pretrain", *SMALL, "--run", path).code == 0
    return path


def pretrain(path: Path, *arguments: str | Path) -> Told:
    return run("pretrain", *SMALL, "--run", path, *arguments)


def refused(told: Told, *words: str) -> None:
    assert told.code == 1 and told.err.count("\n") == 1 and "Traceback" not in told.err, told
    assert all(word in told.err for word in words), (words, told.err)


@pytest.mark.parametrize("strategy", ["loft", "data-parallel", "gpipe"])
def test_a_run_from_its_own_start_is_the_same_run(tmp_path, strategy):
    assert pretrain(tmp_path / "a", "--strategy", strategy).code == 0
    start = tmp_path / "a" / "snapshots" / "epoch-000.safetensors"
    assert pretrain(tmp_path / "b", "--strategy", strategy, "--weights", start).code == 0
    for file in ("model.safetensors", "snapshots/epoch-000.safetensors", "snapshots/epoch-001.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    description = json.loads((tmp_path / "b" / "run.json").read_text())
    assert description["weights"]["path"] == str(start) and len(description["weights"]["sha256"]) == 64


def test_torchvisions_resnet18(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=2).eval()
    with torch.no_grad():
        theirs.bn1.running_mean.normal_()  # statistics of its own, which are not taken over
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    data = (
        "--dataset",
        "imagefolder",
        "--data-dir",
        make_folder(tmp_path / "images", count=2),
        "--image-size",
        "72",
        "--loader-workers",
        "0",
    )
    short = ("--rounds", "1", "--local-iterations", "1", "--batch-size", "2", "--statistics-batch", "2", "--statistics-batches", "1")
    path = tmp_path / "run"
    told = run(
        "pretrain", "--model", "resnet18", *data, *short, "--device", "cpu", "--weights", tmp_path / "theirs.safetensors", "--run", path
    )
    assert told.code == 0, told.err
    start = read_tensors(path / "snapshots" / "epoch-000.safetensors")
    assert start.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(start[name], parameter) for name, parameter in theirs.named_parameters())
    ours = build(Architecture.from_json(json.loads((path / "run.json").read_text())["architecture"]))
    ours.load_state_dict(start | dict(theirs.named_buffers()))
    images = torch.randn(3, 3, 72, 72)
    assert torch.equal(ours.eval()(images), theirs(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_a_new_classifier_is_the_seeds(first, tmp_path, dtype):
    start = load_file(first / "snapshots" / "epoch-000.safetensors")
    theirs = {name: (tensor + 0.25).to(dtype) for name, tensor in start.items() if not name.startswith("fc.")}
    save_file(theirs | {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}, tmp_path / "theirs.safetensors")
    refused(pretrain(tmp_path / "a", "--weights", tmp_path / "theirs.safetensors"), "(1000, 64)", "(10, 64)", "--new-classifier")
    assert pretrain(tmp_path / "a", "--weights", tmp_path / "theirs.safetensors", "--new-classifier").code == 0
    made = read_tensors(tmp_path / "a" / "snapshots" / "epoch-000.safetensors")
    assert all(torch.equal(made[name], tensor.float()) for name, tensor in theirs.items())
    assert torch.equal(made["fc.weight"], start["fc.weight"]) and torch.equal(made["fc.bias"], start["fc.bias"])


DIFFERENCES = {
    "missing": lambda state, name: state.pop(name),
    "shape": lambda state, name: state.update({name: torch.zeros(3, 5)}),
    "dtype": lambda state, name: state.update({name: state[name].double()}),
    "integers": lambda state, name: state.update({name: state[name].to(torch.int64)}),
    "unknown": lambda state, name: state.update({f"{name}_2": torch.zeros(3, 5)}),
    "nan": lambda state, name: state[name].view(-1)[-1:].fill_(float("nan")),
    "infinite": lambda state, name: state[name].view(-1)[:1].fill_(-float("inf")),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_the_first_tensor_that_differs_is_named(first, tmp_path, kind):
    start = load_file(first / "snapshots" / "epoch-000.safetensors")
    for number, name in enumerate(("bn1.bias", "layer3.2.conv2.weight")):
        state = {other: tensor.clone() for other, tensor in start.items()}
        DIFFERENCES[kind](state, name)
        if kind in ("shape", "dtype", "integers") and number == 0:
            DIFFERENCES[kind](state, "layer3.2.bn2.bias")  # a later one
        save_file(state, tmp_path / "theirs.safetensors")
        shapes = [str(tuple(start[name].shape))] if kind in ("missing", "shape") else []
        shapes += ["(3, 5)"] if kind in ("shape", "unknown") else []
        refused(pretrain(tmp_path / "a", "--weights", tmp_path / "theirs.safetensors"), f" {name}", *shapes)
    assert not (tmp_path / "a").exists()


def test_files_that_are_none(first, tmp_path):
    good = first / "model.safetensors"
    (tmp_path / "torn").write_bytes(good.read_bytes()[:-10])
    torch.save(read_tensors(good), tmp_path / "pickled")
    os.mkfifo(tmp_path / "pipe")
    flipped = bytearray(good.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    for name, word in (("torn", "truncated"), ("pickled", "save_file"), ("pipe", "no file"), (".", "no file"), ("gone", "there is no"),
                       ("flipped", "altered")):  # fmt: skip
        refused(pretrain(tmp_path / "a", "--weights", tmp_path / name), str(tmp_path / name if name != "." else tmp_path), word)
    told = pretrain(tmp_path / "a", "--new-classifier")
    assert told.code == 2 and "--weights" in told.err


def test_going_on_needs_the_file_until_there_is_a_checkpoint(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, path = tmp_path / "start.safetensors", tmp_path / "run"
    shutil.copy(first / "snapshots" / "epoch-001.safetensors", file)
    assert pretrain(path, "--weights", "start.safetensors").code == 0
    description, model = json.loads((path / "run.json").read_text()), (path / "model.safetensors").read_bytes()
    (path / "run.json").write_text(json.dumps(description | {"status": "running", "results": None}))
    file.rename(tmp_path / "elsewhere")
    assert run("pretrain", "--run", path, "--resume").code == 0  # from its last checkpoint, at the end
    assert (path / "model.safetensors").read_bytes() == model
    shutil.rmtree(path / "checkpoints")
    (path / "run.json").write_text(json.dumps(description | {"status": "running", "results": None}))
    refused(run("pretrain", "--run", path, "--resume"), "there is no", str(file))
    shutil.copy(first / "snapshots" / "epoch-000.safetensors", file)
    refused(run("pretrain", "--run", path, "--resume"), str(file), "SHA-256")
    refused(run("pretrain", "--run", path, "--resume", "--weights", "elsewhere"), "--weights")
    (tmp_path / "elsewhere").rename(file)
    monkeypatch.chdir("/")
    assert run("pretrain", "--run", path, "--resume").code == 0
    assert (path / "model.safetensors").read_bytes() == model
