"""A network meets data: its own, others of the same classes, and others that it cannot be asked about; transfer with a new classifier."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from loft_hpc.files import read_tensors
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run

from hostile import Told, run
from test_data import make_folder

TINY = ("--model", "resnet20", "--widen", "0.25", "--device", "cpu", "--statistics-batches", "1", "--epochs", "1", "--batch-size", "6")
SHORT = ("--epochs", "1", "--batch-size", "6", "--statistics-batches", "1", "--device", "cpu")
FAST = ("--latency-batch", "2", "--repetitions", "2", "--device", "cpu")
KINDS = {"filter": ("magnitude-l2-0.5", ()), "layer": ("layers-l1-3of7", ("--method", "layers", "--criterion", "l1")),
         "weight": ("magnitude-weights-0.5", ("--unit", "weights"))}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of cats and dogs, with a ticket of each kind, one of them retrained, and other folders of images."""
    home = tmp_path_factory.mktemp("met")
    own = ("--dataset", "imagefolder", "--data-dir", make_folder(home / "own"), "--image-size", "16", "--loader-workers", "0")
    assert run("pretrain", *TINY, *own, "--run", home / "run").code == 0
    for _, options in KINDS.values():
        assert run("prune", home / "run", "--ratio", "0.5", *options, "--device", "cpu").code == 0
    assert run("retrain", home / "run/tickets/magnitude-l2-0.5", *SHORT, "--run", home / "retrained").code == 0
    make_folder(home / "more", ("ape", "cat", "dog"))
    make_folder(home / "fewer", ("dog",))
    make_folder(home / "named otherwise", ("cat", "fox"))
    make_folder(home / "other images", count=4)
    return home


def commands(home: Path) -> dict[str, tuple[str | Path, ...]]:
    """Every command in which a network meets data, without its --data-dir; the first ones only evaluate."""
    ticket = home / "run/tickets/magnitude-l2-0.5"
    return {
        "measure": ("measure", home / "run", *FAST),
        "measure ticket": ("measure", ticket, *FAST),
        "measure retrained": ("measure", home / "retrained", *FAST),
        "compare": ("compare", home / "retrained", *FAST, "--no-energy", "--no-robustness"),
        "check": ("check", ticket, *SHORT, "--seeds", "1"),
        "retrain": ("retrain", ticket, *SHORT, "--run", home / "new"),
        "prune": ("prune", home / "run", "--ratio", "0.25", "--device", "cpu"),
        "search": ("prune", home / "run", "--ratio", "0.25", "--method", "edge-popup", "--search-epochs", "1", "--device", "cpu"),
        "sweep": ("sweep", home / "run", "--ratio", "0.5", "--at", "init", *SHORT),
    }


ACCEPTING = ("measure", "measure ticket", "measure retrained", "compare", "check", "retrain")
"""Those that look at other images of the same classes, with a note; the others continue a result."""
STRANGE = {"more": "with ape", "fewer": "without cat", "named otherwise": "with fox and without dog"}


def refused(told: Told, *words: str) -> None:
    assert told.code == 1 and told.err.count("\n") == 1 and "Traceback" not in told.err, told
    assert all(word in told.err for word in words), told.err


@pytest.mark.parametrize("command", commands(Path()))
def test_other_classes_are_refused_by_name_everywhere(folder, tmp_path, command):
    home = tmp_path / "met"
    shutil.copytree(folder, home)
    before = sorted(home.rglob("*"))
    for images, words in STRANGE.items():
        refused(run(*commands(home)[command], "--data-dir", home / images), words, "--data-dir")
    assert [path for path in sorted(home.rglob("*")) if ".loft-index" not in path.name and path.name != ".lock"] == [
        path for path in before if ".loft-index" not in path.name and path.name != ".lock"
    ]
    format = "table" if command in ("measure ticket", "compare", "retrain") else "json"
    told = run(*commands(home)[command], "--data-dir", home / "other images", "--format", format)
    if command not in ACCEPTING:
        refused(told, "not those that", "--data-dir")
        return
    assert told.code == 0 and "other images of the same classes" in told.out and ("note: " in told.out or format == "json"), told
    if command.startswith("measure"):
        assert "other images" not in run(*commands(home)[command]).out


def test_runs_that_say_no_classes_are_compared_by_number(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    description = json.loads((tmp_path / "run/run.json").read_text())
    for data in ({"classes": None}, {"classes": ["cat"]}, {"classes": 7}, {"classes": [1, 2]}, None):
        description["data"] = None if data is None else json.loads((folder / "run/run.json").read_text())["data"] | data
        if data is not None:  # runs of earlier versions say no mean either
            del description["data"]["mean"], description["data"]["std"]
        (tmp_path / "run/run.json").write_text(json.dumps(description))
        refused(run("measure", tmp_path / "run", *FAST, "--data-dir", folder / "more"), "3 classes in place of 2")
    assert run("measure", tmp_path / "run", *FAST, "--data-dir", folder / "named otherwise").code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_transfer_makes_the_classifier_anew(folder, tmp_path, kind):
    ticket = folder / "run/tickets" / KINDS[kind][0]
    there = ("--dataset", "imagefolder", "--data-dir", folder / "more")
    for rewind in ("none", "init"):
        path = tmp_path / rewind
        told = run("retrain", ticket, *SHORT, *there, "--rewind", rewind, "--run", path, "--seed", "3")
        assert told.code == 0 and "note: the classifier is initialised anew: 3 classes in place of 2, with ape" in told.out, told
    made, body = read_tensors(path / "snapshots/epoch-000.safetensors"), read_tensors(folder / "run/snapshots/epoch-000.safetensors")
    assert made["fc.weight"].shape == (3, 64) and made["fc.weight"].ne(0).all()  # no mask of the old classifier is on it
    assert torch.equal(made["bn1.weight"], body["bn1.weight"])
    opened = Run.open(path)
    assert opened.architecture.num_classes == opened.dense_architecture.num_classes == 3 and opened.description["new_classifier"]
    assert opened.architecture.stem == Run.open(folder / "run").architecture.stem
    build(opened.architecture, opened.hidden_widths).load_state_dict(opened.read_model())
    assert run("measure", path, *FAST).code == 0
    compared = run("compare", tmp_path / "none", tmp_path / "init", *FAST, "--no-energy", "--no-robustness", "--format", "json")
    assert all(entry["against_dense_points"] is None for entry in json.loads(compared.out)["tickets"])  # the dense one saw other images
    # of two networks, that of most runs is compared; the other is named
    mixed = run("compare", folder / "run", tmp_path / "none", tmp_path / "init", *FAST, "--no-energy", "--no-robustness")
    assert mixed.code == 0 and f"note: {folder / 'run'} is passed over: it comes from another network than {tmp_path / 'none'}" in mixed.out
    if kind == "weight":
        model, mask = opened.read_model(), read_tensors(ticket / "mask.safetensors")
        assert all(model[name][kept == 0].eq(0).all() for name, kept in mask.items() if name != "fc.weight")


def test_a_transfer_to_the_same_classes_keeps_the_classifier(folder, tmp_path):
    ticket, there = folder / "run/tickets/magnitude-l2-0.5", ("--dataset", "imagefolder", "--data-dir", folder / "own")
    assert run("retrain", ticket, *SHORT, "--run", tmp_path / "a").code == 0
    told = run("retrain", ticket, *SHORT, *there, "--run", tmp_path / "b")
    assert told.code == 0 and "the classifier is the ticket's" in told.out
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    told = run("retrain", ticket, *SHORT, *there, "--new-classifier", "--run", tmp_path / "c", "--format", "json")
    assert "initialised anew" in json.loads(told.out)["notes"][0]
    start = [read_tensors(tmp_path / name / "snapshots/epoch-000.safetensors") for name in "ac"]
    assert {name for name in start[0] if not torch.equal(start[0][name], start[1][name])} == {"fc.weight", "fc.bias"}


def test_transfers_that_cannot_be(folder, tmp_path):
    ticket = folder / "run/tickets/magnitude-l2-0.5"
    refused(run("retrain", ticket, *SHORT, "--dataset", "digits", "--run", tmp_path / "a"), "1 channel", "3 channels", "pretrain on digits")
    for option in (("--image-size", "16"), ("--download",)):
        told = run("retrain", ticket, *SHORT, *option, "--run", tmp_path / "a")
        assert told.code == 2 and "belongs to --dataset" in told.err
    assert not (tmp_path / "a").exists()
