"""One test for each hole that other people's files once had; test_fuzz.py looks for more."""

import json
import os

import pytest
import torch

from loft_hpc.analysis.timing import Cluster
from loft_hpc.comm.ledger import Ledger
from loft_hpc.data.registry import DataSettings
from loft_hpc.errors import LoftError
from loft_hpc.files import read_json, read_text, refuse_links_outside, write_tensors
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.settings import from_json, to_json
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.pipeline.stages import check_split
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.lock import RunLock
from loft_hpc.runs.run import Run
from loft_hpc.tickets.masks import FilterMask
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.evaluation import network_for
from loft_hpc.training.settings import Evaluation

from hostile import nested, run
from tiny import CPU, initial_state, tiny


def new_run(path, **more) -> Run:
    return Run.create(path, "pretrain", to_json(PretrainSettings()), {"architecture": tiny().to_json()} | more)


def rewrite(path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_somebodys_run_orders_no_download():
    fields = to_json(PretrainSettings(data=DataSettings("cifar10", "/somewhere", download=True)))
    assert fields["data"]["download"]
    for kind in (PretrainSettings, RetrainSettings):
        data = from_json(kind, {"data": fields["data"]}).data
        assert (data.dataset, data.data_dir, data.download) == ("cifar10", "/somewhere", False)


@pytest.mark.parametrize(
    "changed",
    [
        {"widths": [8, 12, 10**12]},
        {"widths": [40_000, 40_000, 40_000]},
        {"blocks": [1, 2, 10**6]},
        {"blocks": [1, 2, -1]},
        {"num_classes": 10**12},
        {"in_channels": 0},
        {"widen": float("nan")},
        {"widen": float("inf")},
        {"num_classes": float("inf")},
        {"model": "../../elsewhere"},
        {"model": ".."},
        {"model": "two\nlines"},
    ],
    ids=str,
)
def test_impossible_networks_are_refused_before_they_are_built(changed):
    with pytest.raises(LoftError):
        Architecture.from_json(tiny().to_json() | changed)


def test_the_widest_networks_that_one_may_ask_for_are_not_refused():
    assert architecture("wideresnet34", 100_00, widen=32).hidden_widths()["layer4.2"] == 16_384


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 10**18},
        {"epochs": "5"},
        {"epochs": True},
        {"epochs": 2.5},
        {"seed": 2**70},
        {"widen": float("nan")},
        {"widen": [2]},
        {"model": "\x1b[2J"},
        {"data": {"dataset": ["digits"]}},
        {"data": {"dataset": "synthetic", "image_size": 10**6}},
        {"data": {"loader_workers": 10**6}},
        {"data": {"data_dir": "\0"}},
        {"data": 5},
        {"evaluation": {"statistics_batch": 10**15}},
        {"evaluation": {"statistics_batches": 10**15}},
        {"computation": {"device": "nowhere"}},
        {"optimisation": {"milestones": ["a"]}},
        {"optimisation": {"lr": 10**400}},
        {"pipeline": {"split": "9" * 5000}},
        {"snapshots": {"snapshot_every": None}},
    ],
    ids=lambda changed: str(changed)[:60],
)
def test_settings_of_other_types_and_out_of_bounds_are_refused(changed):
    with pytest.raises(LoftError):
        from_json(PretrainSettings, to_json(PretrainSettings()) | changed)


def test_cuts_of_thousands_of_digits_are_refused():
    with pytest.raises(LoftError, match="not known"):
        check_split("9" * 5000)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for file in ("pipe.json", "device.json"):
        if file == "device.json":
            (tmp_path / file).symlink_to("/dev/zero")
        with pytest.raises(LoftError, match="no plain file"):
            read_json(tmp_path / file)
    made = new_run(tmp_path / "run")
    os.mkfifo(made.path / "metrics.jsonl")
    with pytest.raises(LoftError, match="no plain file"):
        made.events("epoch")
    with pytest.raises(LoftError, match="no plain file"):
        made.forget_after(0)


def test_files_without_end_are_not_read(tmp_path):
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(tmp_path / "run.json", 10)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 43)
    told = run("measure", tmp_path, "--distance-to", tmp_path / "model.safetensors")
    assert told.code == 1 and "cannot be read" in told.err


def test_json_nested_more_deeply_than_it_can_be_written_again(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"resumed": nested(400)}))
    with pytest.raises(LoftError, match="nested too deeply"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize(
    "place", ["checkpoints", "snapshots", "tickets", "sweeps", "metrics.jsonl", ".lock", "tickets/.magnitude-l2-0.5.new"]
)
def test_nothing_is_written_or_removed_through_a_link_out_of_the_run(tmp_path, place):
    """A resumed run once emptied the hidden files of the folder that its checkpoints were a link to."""
    others = tmp_path / "others"
    for name in (".key", "000001/state.safetensors", "scores-000009.safetensors"):
        (others / name).parent.mkdir(parents=True, exist_ok=True)
        (others / name).write_text("precious")
    made = new_run(tmp_path / "run", total_steps=4, steps_per_epoch=2, world_size=1)
    (made.path / place).parent.mkdir(exist_ok=True)
    (made.path / place).symlink_to(others / ".key" if place in ("metrics.jsonl", ".lock") else others)
    for command in (("pretrain", "--run", made.path, "--resume"), ("prune", made.path), ("sweep", made.path)):
        told = run(*command)
        assert told.code == 1 and f"{place} is a link out of" in told.err, told.err
    found = {str(file.relative_to(others)): file.read_text() for file in others.rglob("*") if file.is_file()}
    assert found == dict.fromkeys((".key", "000001/state.safetensors", "scores-000009.safetensors"), "precious")


def test_a_run_that_is_a_link_and_links_inside_it_are_welcome(tmp_path):
    made = new_run(tmp_path / "scratch" / "run")
    (made.path / "newest").symlink_to("run.json")
    (tmp_path / "run").symlink_to(made.path)
    refuse_links_outside(tmp_path / "run")


def test_the_lock_is_no_way_to_somebodys_file(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(LoftError, match="symbolic links"):
        RunLock(tmp_path / "run").acquire()
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "number", [-1, 1.5, "7", True, None, float("nan"), float("inf"), 2**63, 10**400], ids=lambda number: str(number)[:9]
)
def test_ledgers_count_in_whole_numbers(number):
    with pytest.raises((ValueError, TypeError)):
        Ledger.from_json({"allreduce": {"shared": {"calls": number}}})


def test_ledgers_know_their_operations():
    with pytest.raises(ValueError, match="unknown operation"):
        Ledger.from_json({"\x1b[2J": {"shared": {"calls": 1}}})


@pytest.mark.parametrize(
    "changed",
    [
        {"results": 5},
        {"data": []},
        {"ticket": "x"},
        {"resumed": 5},
        {"hidden_widths": [1]},
        {"steps_per_epoch": 0},
        {"total_steps": 10**18},
        {"world_size": "2"},
        {"kind": ["pretrain"]},
    ],
    ids=str,
)
def test_runs_that_say_what_no_run_says(tmp_path, changed):
    made = new_run(tmp_path / "run", total_steps=4, steps_per_epoch=2, world_size=1)
    rewrite(made.path / "run.json", **changed)
    with pytest.raises(LoftError, match=f"no sensible {next(iter(changed))}"):
        Run.open(made.path)


@pytest.mark.parametrize("widths", [{}, {"layer1.0": "8"}, {"layer1.0": 10**12}, {"layer1.0": 0}])
def test_hidden_widths_that_the_network_has_not(tmp_path, widths):
    full = tiny().hidden_widths()
    made = new_run(tmp_path / "run", hidden_widths=full | widths if widths else {})
    with pytest.raises(LoftError, match="hidden_widths"):
        _ = Run.open(made.path).hidden_widths


def test_log_lines_that_no_run_wrote_are_passed_over(tmp_path):
    made = new_run(tmp_path / "run")
    made.log("epoch", step=4, loss=1.0)
    strange = ("[" * 100_000, '{"event": "epoch", "step": ' + "9" * 400 + "}", '"step"', "[]", "9" * 3_000_000)
    steps = ('"4"', "NaN", "Infinity", "-1", "1e3", "true", "null", "{}")
    with open(made.path / "metrics.jsonl", "a") as file:
        file.writelines(f"{line}\n" for line in (*strange, *(f'{{"event": "epoch", "step": {step}}}' for step in steps)))
    made.log("epoch", step=8, loss=0.5)
    assert [event["step"] for event in made.events("epoch")] == [4, 8]
    made.forget_after(4)
    assert (made.path / "metrics.jsonl").read_text().count("\n") == 1


def test_checkpoints_with_odd_names_are_none(tmp_path):
    """`²` is a digit, but no number."""
    made = new_run(tmp_path / "run")
    for name in ("²", "٣", "7", "-00001", "9" * 200):
        (made.path / "checkpoints" / name).mkdir(parents=True)
    assert made.checkpoints.newest_step(print) is None


@pytest.mark.parametrize("changed", [{"step": 10**18}, {"round": "3"}, {"round": -1}, {"wall_seconds": []}, {"wall_seconds": 10**400}, {"ledgers": []}, {"epoch_so_far": 5}])  # fmt: skip
def test_checkpoints_with_counters_that_no_training_leaves(tmp_path, changed):
    made = new_run(tmp_path / "run")
    made.checkpoints.write(Checkpoint(8, {"a": torch.zeros(1)}, [Ledger()], {"round": 1, "wall_seconds": 1.0}), 2)
    assert made.checkpoints.newest_step(print) == 8
    rewrite(made.path / "checkpoints" / "000008" / "progress.json", **changed)
    with pytest.raises(LoftError):
        made.checkpoints.newest_step(print)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bool, torch.bfloat16])
def test_tensors_of_other_types_are_no_network(dtype):
    state = initial_state(tiny())
    state["fc.weight"] = state["fc.weight"].to(dtype)
    with pytest.raises(LoftError, match=r"fc\.weight is of"):
        network_for(tiny(), None, state, CPU, "a file")


def test_scores_of_other_filters_and_types(tmp_path):
    made = new_run(tmp_path / "run")
    good = {
        f"{criterion}/{name}": torch.rand(width) for criterion in ("l1", "l2", "bn-scale") for name, width in tiny().hidden_widths().items()
    }
    made.snapshots.write_scores(0, good)
    assert made.snapshots.read_scores(0).keys() == good.keys()
    for name, wrong in (("l2/layer1.0", torch.rand(9)), ("l2/layer1.0", torch.rand(8).bfloat16()), ("l2/\x1b[2J", torch.rand(8))):
        made.snapshots.write_scores(0, good | {name: wrong})
        with pytest.raises(LoftError, match="does not hold the scores"):
            made.snapshots.read_scores(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bool])
def test_masks_of_other_types(tmp_path, dtype):
    selection = {name: torch.arange(width) for name, width in tiny().hidden_widths().items()}
    Ticket(tmp_path / "ticket", FilterMask(tiny(), selection), initial_state(tiny()), {}).write()
    assert Ticket.read(tmp_path / "ticket").hidden_widths == tiny().hidden_widths()
    masks = {name: torch.ones(len(kept), dtype=dtype) for name, kept in selection.items()}
    write_tensors(tmp_path / "ticket" / "mask.safetensors", masks)
    with pytest.raises(LoftError, match="no mask"):
        Ticket.read(tmp_path / "ticket")


@pytest.mark.parametrize(
    "line",
    [
        "latency_seconds = inf",
        "flops_per_second = 5e-324",
        f"flops_per_second = 1{'0' * 400}",
        f"flops_per_second = 0x{'f' * 5000}",
        f"flops_per_second = {'9' * 5000}",
        f"source = {'[' * 30_000}",
        "source = [1]",
        "name = 5",
        "source = '" + "a" * 100_000 + "'",
    ],
    ids=lambda line: line[:30],
)
def test_clusters_that_no_cluster_is(tmp_path, line):
    good = {"name": '"x"', "latency_seconds": "1", "bandwidth_bytes_per_second": "1", "flops_per_second": "1"}
    name, value = line.split(" = ")
    (tmp_path / "c.toml").write_text("\n".join(f"{key} = {text}" for key, text in (good | {name: value}).items()))
    with pytest.raises(LoftError) as told:
        Cluster.read(str(tmp_path / "c.toml"))
    assert "\n" not in str(told.value)


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path):
    told = run("measure", tmp_path / "\x1b]0;owned\x07\nloft: done \udcff")
    assert told.code == 1 and told.err.count("\n") == 1
    assert r"\x1b]0;owned\x07" in told.err and r"\xff" in told.err


@pytest.mark.parametrize("strategy", ["loft", "gpipe"])
def test_communication_of_a_billion_steps_is_not_gone_through(tmp_path, strategy):
    made = new_run(tmp_path / "run", total_steps=10**9, steps_per_epoch=2, world_size=2)
    rewrite(made.path / "run.json", configuration=to_json(PretrainSettings(strategy=strategy)))
    made.write_ledger([Ledger(), Ledger()])
    told = run("commcost", made.path)
    assert told.code == 1 and "too many to go through" in told.err


def test_settings_that_are_in_use_stay_within_the_bounds():
    settings = PretrainSettings(epochs=10_000, evaluation=Evaluation(evaluation_batch=1024, statistics_batch=1024, statistics_batches=1000))
    assert from_json(PretrainSettings, to_json(settings)) == settings
