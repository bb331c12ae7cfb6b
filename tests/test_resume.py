"""What may change when a run is resumed, and what is fixed for its life: every option of every training command."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest

from loft_hpc.cli.main import loft, run
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.settings import CHANGEABLE, flatten
from loft_hpc.runs.run import Run

RUN = ["--model", "resnet20", "--widen", "0.25", "--dataset", "digits", "--batch-size", "256", "--epochs", "2", "--statistics-batches", "1"]
# another value than the runs below have, for options whose type does not say one
OTHER = {
    "checkpoint_every": "3it", "warmup": "1it", "snapshot_every": "2it", "rewind": "init", "split": "balanced", "tolerance": "0.5",
    "patience": "3", "widen": "0.5", "image_size": "16", "rounds": "3", "batch_parts": "2", "milestones": "0.25", "stall_seconds": "100",
    "evaluation_batch": "90", "momentum": "0.5", "leave_out": "list", "weights": "weights.safetensors",
    "loader_workers": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    here = os.getcwd()
    os.chdir(path)
    try:
        assert run(["pretrain", *RUN, "--run", "pretrain"]) == 0
        assert run(["prune", "pretrain", "--ratio", "0.5"]) == 0
        assert run(["retrain", "pretrain/tickets/magnitude-l2-0.5", "--epochs", "2", "--batch-size", "256", "--run", "retrain"]) == 0
    finally:
        os.chdir(here)
    return path


def as_killed(source: Path, copy: Path) -> Path:
    """A copy of a finished run as it was before its last epoch, without a word of its end."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("tickets", "model.safetensors", "ledger.json"))
    shutil.rmtree(max((copy / "checkpoints").iterdir()))
    description = json.loads((copy / "run.json").read_text()) | {"status": "running", "results": None}
    (copy / "run.json").write_text(json.dumps(description))
    return copy


def other(parameter: click.Option, now) -> list[str]:
    """The option with another value than `now`."""
    if parameter.is_flag:
        return [(parameter.secondary_opts if now and parameter.secondary_opts else parameter.opts)[0]]
    if isinstance(parameter.type, click.Choice):
        return [parameter.opts[0], next(choice for choice in parameter.type.choices if choice != now)]
    value = OTHER.get(parameter.name)
    if value is None:
        value = str(now + 1) if isinstance(now, int) else str(now / 2) if isinstance(now, float) else "elsewhere"
    return [parameter.opts[0], value]


@pytest.mark.parametrize(("kind", "settings"), [("pretrain", PretrainSettings), ("retrain", RetrainSettings)])
def test_every_option_is_fixed_or_may_change(folder, tmp_path, capsys, monkeypatch, kind, settings):
    """From another folder than the run was started in: those of the table are taken and recorded, all others refused by name."""
    monkeypatch.chdir(tmp_path)
    ticket = [str(folder / "pretrain/tickets/magnitude-l2-0.5")] if kind == "retrain" else []
    path = as_killed(folder / kind, tmp_path / "run")
    fields = flatten(settings())
    options = [known for known in loft.get_command(None, kind).params if known.name in fields]
    elsewhere = {"restarts", "transfer"} | ({"leave_out"} if kind == "retrain" else set())  # no options of this command
    assert {known.name for known in options} == fields.keys() - elsewhere
    (tmp_path / "list").write_text("train/a/b.png\n")
    now = flatten(settings(**{"epochs": 2, "batch_size": 256})) | {"widen": 0.25, "statistics_batches": 1}
    changing = []
    for known in options:
        given = other(known, now[known.name])
        if known.name in CHANGEABLE:
            changing += given if known.name != "download" else []
            continue
        if kind == "retrain" and known.name == "image_size":  # belongs to --dataset
            continue
        capsys.readouterr()
        assert run([kind, *ticket, "--run", str(path), "--resume", *given]) in (1, 2), given
        (line,) = capsys.readouterr().err.splitlines()
        assert known.opts[0] in line, (given, line)
    assert Run.open(path).description["status"] == "running"  # nothing was touched
    device = changing.index("--device")
    changing[device + 1] = "cpu"
    assert run([kind, *ticket, "--run", str(path), "--resume", *changing, "--stall-seconds", "100"]) == 0
    description = Run.open(path).description
    changed = description["resumed"][0]["changed"]
    assert changed.keys() == {known.name for known in options if known.name in CHANGEABLE} - {"download"} | {"stall_seconds"}
    assert changed["data_dir"] == {"before": str(folder / "data"), "now": str(tmp_path / "elsewhere")}
    assert description["configuration"]["data"]["data_dir"] == str(tmp_path / "elsewhere")
    # and the next attempt keeps them
    again = as_killed(path, tmp_path / "again")
    assert run([kind, *ticket, "--run", str(again), "--resume"]) == 0
    assert Run.open(again).description["resumed"][1]["changed"] == {"stall_seconds": {"before": 100.0, "now": 300.0}}


def test_what_cannot_be_extended_says_what_to_do(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(code: int, *arguments: str) -> str:
        capsys.readouterr()
        assert run(["pretrain", *arguments]) == code, arguments
        (line,) = capsys.readouterr().err.splitlines()
        return line

    shutil.copytree(folder / "pretrain", tmp_path / "run")
    assert "give --run and --resume" in refused(2, "--extend-to", "3")
    assert "is none: omit the option" in refused(2, "--extend-to", "3", "--resume", "--run", "nothing")
    assert not Path("nothing").exists()
    assert "has 2 epochs already" in refused(2, "--extend-to", "2", "--resume", "--run", "run")
    advice = refused(1, "--extend-to", "3", "--resume", "--run", "run")
    command = advice.partition("(")[2].partition(")")[0].replace("COPY", "copy")
    assert os.system(command) == 0 and not Path("copy/tickets").exists()
    before = Run.open(Path("run")).description
    assert run(["pretrain", "--extend-to", "3", "--resume", "--run", "copy"]) == 0
    assert Run.open(Path("run")).description == before
    assert Run.open(Path("copy")).description["configuration"]["optimisation"]["restarts"] == [2]
    # the same command again, as a job script gives it, finds it done
    assert run(["pretrain", "--extend-to", "3", "--resume", "--run", "copy"]) == 0
    killed = as_killed(folder / "pretrain", tmp_path / "killed")
    assert "resume it without --extend-to first" in refused(1, "--extend-to", "3", "--resume", "--run", str(killed))
