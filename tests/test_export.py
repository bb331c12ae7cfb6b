"""Networks that leave the program: tickets that carry what they need, files that others run, and modules for
programs of one's own."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from safetensors import safe_open

import loft_hpc
from loft_hpc import LoftError
from loft_hpc.cli.main import run as loft
from loft_hpc.comm.alone import Alone
from loft_hpc.data.embedded import digits, textures
from loft_hpc.files import read_tensors, write_tensors
from loft_hpc.jobs.export import compare
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.formats import FORMATS, FromPixels
from loft_hpc.models.resnet import build
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.evaluation import reestimate_statistics
from loft_hpc.training.settings import Evaluation

from hostile import hostile, run, written
from tiny import CPU, tiny

SHORT = ("--epochs", "1", "--batch-size", "512", "--statistics-batches", "2", "--device", "cpu")
TICKETS = {
    "filters": ("--ratio", "0.5"),
    "weights": ("--ratio", "0.9", "--unit", "weights", "--scope", "global"),
    "layers": ("--ratio", "0.5", "--method", "layers", "--criterion", "snip"),
    "snapshot": ("--ratio", "0.5", "--at", "init"),
}
COMPILED = ("run/tickets/weights", "run/tickets/layers", "retrained")
"""Exported by torch.export as well, which takes seconds."""
NETWORKS = (*(f"run/tickets/{name}" for name in TICKETS), "run", "retrained")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, tickets of every kind, and a retrained one; and the accuracies that `loft prune` printed."""
    folder, printed = tmp_path_factory.mktemp("export"), {}
    told = run("pretrain", "--model", "preresnet20", "--widen", "0.25", *SHORT, "--run", folder / "run")
    assert told.code == 0, told.err
    for name, options in TICKETS.items():
        told = run("prune", folder / "run", *options, "--name", name, "--device", "cpu", "--format", "json")
        assert told.code == 0, told.err
        printed[name] = json.loads(told.out)["tickets"][0]["accuracy_before_retraining"]
    assert run("retrain", folder / "run/tickets/filters", *SHORT, "--run", folder / "retrained").code == 0
    return folder, printed


def load(path):
    return loft_hpc.load_ticket(path) if (path / "ticket.json").exists() else loft_hpc.load_run(path)


def test_images():
    return next(iter(digits(CPU).test_batches(7, 0, 1)))[0].contiguous()


test_images.__test__ = False


def export(*arguments) -> tuple[int, str, str]:
    """Without a limit to memory: onnxruntime maps more than it uses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = loft(["export", *map(str, arguments), "--device", "cpu"])
    return code, out.getvalue(), err.getvalue()


# -- what a ticket holds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TICKETS)
@torch.no_grad()
def test_a_ticket_has_what_it_takes_to_be_run(made, name):
    """Its own statistics: as it lies on disk it does what `loft prune` said of it. The dense network's, cut, give
    another accuracy."""
    folder, printed = made
    data = digits(CPU)
    network = load(folder / "run/tickets" / name)
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in data.test_batches(250, 0, 1))
    assert right / data.info.test_images == printed[name]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    reestimate_statistics(network, data, Evaluation(statistics_batches=2), Alone())
    for name_, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name_], rtol=1e-4, atol=1e-4)  # batches of another make, summed in another order
    facts = network.metadata
    assert tuple(facts["mean"]) == data.info.mean and tuple(facts["std"]) == data.info.std and tuple(facts["classes"]) == data.info.classes
    assert (facts["channels"], facts["image_size"], facts["num_classes"]) == (1, 8, 10)
    assert facts["run"] == "run" and facts["ratio"] == float(TICKETS[name][1]) and facts["kind"] == "ticket"
    assert not network.training


def test_statistics_do_not_tell_tickets_apart(made, tmp_path):
    """A run goes on with its ticket whether it noted the sum of an earlier version, which covered statistics, or
    today's; with no other."""
    folder, _ = made
    ticket = Ticket.read(folder / "run/tickets/filters")
    other = Ticket(ticket.path, ticket.mask, {name: tensor + name.endswith("running_mean") for name, tensor in ticket.state.items()}, {})
    assert other.fingerprint == ticket.fingerprint and other.fingerprints[1] != ticket.fingerprints[1]
    state = ticket.state | {"fc.bias": ticket.state["fc.bias"] + 1}
    assert Ticket(ticket.path, ticket.mask, state, {}).fingerprint != ticket.fingerprint
    shutil.copytree(folder / "retrained", tmp_path / "retrained")
    file = tmp_path / "retrained/run.json"
    for recorded, code in ((ticket.fingerprints[0], 0), (ticket.fingerprints[1], 0), ("0" * 64, 1)):
        fields = json.loads(file.read_text())
        fields["ticket"]["sha256"] = recorded
        file.write_text(json.dumps(fields))
        assert run("retrain", ticket.path, "--run", tmp_path / "retrained", "--resume").code == code


@torch.no_grad()
def test_tickets_of_earlier_versions_get_what_they_lack_from_the_data(made, tmp_path):
    """They name no input, and hold the dense network's statistics, cut, or none. They need not lie in their run."""
    path, ticket = tmp_path / "moved", Ticket.read(made[0] / "run/tickets/filters")
    expected = load(ticket.path)
    shutil.copytree(ticket.path, path)
    fields = json.loads((path / "ticket.json").read_text())
    (path / "ticket.json").write_text(json.dumps({key: value for key, value in fields.items() if key != "input"}))
    for statistics in (True, False):
        state = {name: tensor + ("running" in name) for name, tensor in ticket.state.items() if statistics or "running" not in name}
        write_tensors(path / "model.safetensors", state)
        network = load(path)
        torch.testing.assert_close(network(test_images()), expected(test_images()))
        assert network.metadata | {"name": "filters"} == expected.metadata
        assert export(path, "--output", tmp_path / f"{statistics}.safetensors")[0] == 0
    fields["data"] |= {"dataset": "imagefolder", "data_dir": str(tmp_path / "nowhere")}
    (path / "ticket.json").write_text(json.dumps({key: value for key, value in fields.items() if key != "input"}))
    with pytest.raises(LoftError, match=r"earlier version.*nowhere"):
        load(path)


@given(value=hostile)
def test_an_input_that_no_network_takes_is_refused_in_one_line(made, tmp_path_factory, value):
    path = tmp_path_factory.mktemp("hostile") / "ticket"
    shutil.copytree(made[0] / "run/tickets/filters", path)
    fields = json.loads((path / "ticket.json").read_text())
    own = fields["input"]
    spoilt = [own | {name: value} for name in own] + [own | {name: [*own[name][:-1], value]} for name in ("classes", "mean", "std")]
    for given_ in [value, *spoilt]:
        (path / "ticket.json").write_text(written(fields | {"input": given_}))
        told = []
        try:
            facts = load(path).metadata
            json.dumps(facts, allow_nan=False)
            assert len(facts["classes"]) in (0, 10) and all(isinstance(name, str) for name in facts["classes"])
        except LoftError as problem:
            told = str(problem).splitlines()
        assert len(told) < 2


# -- files that others run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_exported_files_do_what_the_network_does(made, tmp_path, name):
    path = made[0] / name
    network, images = load(path), test_images()
    code, out, err = export(path, "--output", tmp_path / "own.safetensors")
    assert code == 0, err
    assert "largest difference" in out and "32 test images" in out
    facts = json.loads((tmp_path / "own.json").read_text())
    with safe_open(tmp_path / "own.safetensors", framework="pt") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items() if key != "sha256"} == facts
    runnable = {"safetensors": FORMATS["safetensors"].read(tmp_path / "own.safetensors")}
    if name in COMPILED:
        code, out, err = export(path, "--output", tmp_path / "own.pt2")
        assert code == 0, err
        extra = {"metadata.json": ""}
        runnable["pt2"] = torch.export.load(tmp_path / "own.pt2", extra_files=extra).module()
        assert json.loads(extra["metadata.json"]) == facts
    for read_back in runnable.values():
        for batch in (images, images[:1]):
            torch.testing.assert_close(read_back(batch), network(batch), rtol=1e-4, atol=1e-5)
    own = json.loads(json.dumps(network.metadata))
    assert own["accuracy"] in (None, facts["accuracy"]) and facts == own | {"accuracy": facts["accuracy"]}


@torch.no_grad()
def test_onnx_keeps_zeros_and_metadata(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = build(tiny(), seed=0).eval()
    kept = 0
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.9] = 0
            kept += int((parameter != 0).sum())
    FORMATS["onnx"].write(network, (1, 8, 8), tmp_path / "own.onnx", {"classes": ["a", "\udcff"], "mean": [0.1], "std": None})
    session = onnxruntime.InferenceSession(tmp_path / "own.onnx")
    for batch in (test_images(), test_images()[:1]):
        (scores,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), network(batch), rtol=1e-4, atol=1e-5)
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts == {"classes": ["a", "\udcff"], "mean": [0.1], "std": None}  # a folder's name need not be UTF-8
    model = onnx.load(tmp_path / "own.onnx")
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) > 1]
    assert sum(int((weight != 0).sum()) for weight in weights) == kept


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("pre_activation", [False, True])
@torch.no_grad()
def test_every_format_takes_every_network(tmp_path, pre_activation, stem):
    """Both stems, both orders of activation, other widths of blocks, any number of images."""
    shape = Architecture("tiny", (1, 2), (8, 12), pre_activation, 1.5, stem, 3, 5)
    widths = shape.hidden_widths() | {"layer1.0": 3, "layer2.1": 7}
    network = build(shape, widths, seed=3).eval()
    images = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for name, writer in FORMATS.items():
        if name == "onnx" and (not find_spec("onnxscript") or pre_activation != (stem == "imagenet")):
            continue  # seconds each: one of each kind
        writer.write(network, (3, 40, 40), tmp_path / f"net{writer.ending}", {"architecture": shape.to_json(), "hidden_widths": widths})
        assert compare(writer.read(tmp_path / f"net{writer.ending}"), images, network(images)).small


@pytest.mark.parametrize("data", [digits, textures], ids=["one mean for all", "each by itself"])
@torch.no_grad()
def test_folded_normalisation_takes_pixels(data, tmp_path):
    opened = data(CPU)
    images = next(iter(opened.test_batches(9, 0, 1)))[0].contiguous()
    network = build(tiny(num_classes=opened.info.num_classes), seed=1).eval()
    whole = FromPixels(network, opened.info.mean, opened.info.std).eval()
    pixels = opened.pixels.to_pixels(images)
    assert pixels.min() >= 0 and pixels.max() <= 1
    FORMATS["pt2"].write(whole, tuple(images.shape[1:]), tmp_path / "net.pt2", {})
    assert compare(FORMATS["pt2"].read(tmp_path / "net.pt2"), pixels, network(images)).small


def test_folded_files_say_that_nothing_is_left_to_do(made, tmp_path):
    code, _, err = export(made[0] / "retrained", "--output", tmp_path / "own.pt2", "--fold-normalisation")
    assert code == 0, err
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "own.pt2", extra_files=extra)
    facts = json.loads(extra["metadata.json"])
    assert facts["normalisation_folded"] and facts["mean"] == [0] and facts["std"] == [1]


@pytest.mark.parametrize("factor", [1 + 3e-4, float("nan"), float("inf")])
def test_what_differs_is_not_small(factor):
    scores = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    replies = iter((scores[:1], scores[1:] * factor))
    assert not compare(lambda images: next(replies), torch.zeros(4, 1, 8, 8), scores).small
    assert compare(lambda images: images.flatten(1)[:, :10], torch.ones(4, 1, 8, 8), torch.ones(4, 10)).small


def test_a_network_whose_scores_are_no_numbers_leaves_no_file(made, tmp_path):
    shutil.copytree(made[0] / "run/tickets/filters", tmp_path / "ticket")
    state = read_tensors(tmp_path / "ticket/model.safetensors")
    write_tensors(tmp_path / "ticket/model.safetensors", state | {"fc.weight": torch.full_like(state["fc.weight"], 3e38)})
    code, _, err = export(tmp_path / "ticket", "--output", tmp_path / "own.safetensors")
    assert code == 1 and err.startswith("loft: ") and err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["ticket"]


def test_what_cannot_be_exported_is_refused_in_one_line(made, tmp_path):
    folder, _ = made
    ticket, taken = folder / "run/tickets/filters", tmp_path / "taken.pt2"
    taken.write_text("mine")
    (tmp_path / "beside.json").write_text("mine")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder / "run", unfinished)
    fields = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(fields | {"status": "interrupted"}))
    other = tmp_path / "other"
    shutil.copytree(ticket, other)
    fields = json.loads((other / "ticket.json").read_text())
    fields["input"]["classes"][3] = "drei"
    (other / "ticket.json").write_text(json.dumps(fields))
    before = sorted(entry.name for entry in tmp_path.iterdir())
    for arguments, code, words in (
        ((ticket, "--output", taken), 1, "never overwritten"),
        ((ticket, "--output", tmp_path / "beside.safetensors"), 1, "beside.json exists"),
        ((ticket, "--output", tmp_path / "nowhere/own.pt2"), 1, "no folder"),
        ((ticket, "--output", tmp_path / "own.pth"), 2, ".pt2"),
        ((ticket, "--output", tmp_path / "own"), 2, ".pt2"),
        ((ticket, "--output", tmp_path / "own.pt2", "--format", "onnx"), 2, "must end in .onnx"),
        ((ticket, "--output", tmp_path / "own.pt2", "--format", "tensorrt"), 2, "tensorrt"),
        ((ticket, "--output", tmp_path / "own.safetensors", "--fold-normalisation"), 2, "no computation"),
        ((ticket,), 2, "--output"),
        ((unfinished, "--output", tmp_path / "own.pt2"), 1, "--resume"),
        ((tmp_path, "--output", tmp_path / "own.pt2"), 1, "neither a run nor a ticket"),
        ((other, "--output", tmp_path / "own.pt2"), 1, "differ in classes"),
    ):
        got, _, err = export(*arguments)
        assert got == code and words in err and err.startswith("loft: ") and err.count("\n") == 1, (arguments, err)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before and taken.read_text() == "mine"


def test_missing_packages_are_named(monkeypatch, tmp_path, made):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = export(made[0] / "run", "--output", tmp_path / "own.onnx")
    assert code == 1 and "onnxscript" in err and "pip install" in err and err.count("\n") == 1


# -- modules for programs of one's own ----------------------------------------------------------------------------------------


def test_loading_refuses_the_other_kind_of_folder(made, tmp_path):
    for load_, path in (
        (loft_hpc.load_ticket, made[0] / "run"),
        (loft_hpc.load_run, made[0] / "run/tickets/filters"),
        (loft_hpc.load_run, tmp_path),
    ):
        with pytest.raises(LoftError, match="is no "):
            load_(path)


PROGRAM = """
import sys
for name in ("mpi4py", "horovod"):
    sys.modules[name] = None
import loft_hpc
assert "torch" not in sys.modules, "import loft_hpc imports torch"
ticket, run, reply = sys.argv[1:]
networks = loft_hpc.load_ticket(ticket), loft_hpc.load_run(str(run))
import torch
assert all(isinstance(network, torch.nn.Module) for network in networks)
images = torch.linspace(-1, 1, 192).view(3, 1, 8, 8)
from safetensors.torch import save_file
save_file({str(number): network(images).detach() for number, network in enumerate(networks)}, reply)
assert not {"mpi4py.MPI", "horovod.torch"} & set(sys.modules)
"""


@torch.no_grad()
def test_networks_load_where_neither_mpi_nor_horovod_is(made, tmp_path):
    """With a ticket of an earlier version, whose statistics have to be made from the data first."""
    old = tmp_path / "old"
    shutil.copytree(made[0] / "run/tickets/filters", old)
    fields = json.loads((old / "ticket.json").read_text())
    del fields["input"]
    (old / "ticket.json").write_text(json.dumps(fields))
    reply = tmp_path / "scores.safetensors"
    done = subprocess.run([sys.executable, "-c", PROGRAM, old, made[0] / "run", reply], timeout=300, capture_output=True, text=True, cwd=Path(__file__).parent.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    images = torch.linspace(-1, 1, 192).view(3, 1, 8, 8)
    with safe_open(reply, framework="pt") as file:
        torch.testing.assert_close(file.get_tensor("0"), load(made[0] / "run/tickets/filters")(images))
        torch.testing.assert_close(file.get_tensor("1"), load(made[0] / "run")(images))
