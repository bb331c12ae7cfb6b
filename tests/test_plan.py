"""`loft plan`: a job script read without being run, and what its stages would take; and the dry run of a retraining."""

import json
import os
import shutil
from pathlib import Path

import pytest

from loft_hpc.analysis.timing import Cluster
from loft_hpc.cli.main import run
from loft_hpc.errors import LoftError
from loft_hpc.jobs.dryrun import data_shape
from loft_hpc.jobs.jobscript import read_script, sbatch_options
from loft_hpc.jobs.plan import expected_ticket
from loft_hpc.jobs.prediction import Case
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import ticket_data
from loft_hpc.models.groups import parameters_of
from loft_hpc.runs.run import Run
from loft_hpc.tickets.pruning import Pruning
from loft_hpc.tickets.ticket import Ticket

ROOT = Path(__file__).parent.parent
HEAD = """#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
. "${LOFT_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
"""


@pytest.fixture(autouse=True)
def _no_job_around(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "LOFT_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one epoch on digits, with tickets of every kind."""
    path = tmp_path_factory.mktemp("plan") / "run"
    small = ("--device", "cpu", "--batch-size", "256")
    statistics = ("--statistics-batches", "1")
    assert run(["pretrain", "--model", "resnet20", "--epochs", "1", *small, *statistics, "--run", str(path)]) == 0
    for options in TICKETS.values():
        assert run(["prune", str(path), *options, "--device", "cpu"]) == 0
    return path


TICKETS = {
    "magnitude-l2-release-0.8": ("--ratio", "0.8", "--blocks", "release"),
    "magnitude-l2-0.5-by4": ("--ratio", "0.5", "--round-to", "4"),
    "magnitude-weights-0.9": ("--ratio", "0.9", "--unit", "weights", "--name", "magnitude-weights-0.9"),
    "layers-l1-3of7": ("--method", "layers", "--criterion", "l1", "--ratio", "0.5", "--name", "layers-l1-3of7"),
}


def planned(capsys, *arguments: str) -> dict:
    assert run(["plan", *arguments, "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def dry(capsys, *arguments: str) -> dict:
    assert run([*arguments, "--dry-run", "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# -- a whole job --------------------------------------------------------------------------------------------------


def test_the_posters_job_from_pretraining_to_its_last_ticket(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = planned(capsys, str(ROOT / "slurm/imagenet.sh"), "--cluster", "infiniband-hdr")
    assert (plan["workers"], plan["nodes"], plan["ranks_per_node"], plan["gpus"]) == (4, 4, 1, 4)
    pretraining, pruning, *retrainings = plan["stages"]
    alone = dry(capsys, "pretrain", "--preset", "imagenet-preresnet18", "--workers", "4", "--cluster", "infiniband-hdr")
    assert pretraining["seconds"] == alone["training_seconds"] and pretraining["images"] == alone["images"]
    assert pretraining["payload_sent_bytes"] == alone["training"]["payload_sent_bytes"]
    assert [one["stage"] for one in retrainings] == [f"retrain magnitude, ratio {ratio}" for ratio in (0.8, 0.5, 0.3)]
    assert retrainings[0]["seconds"] < retrainings[1]["seconds"] < retrainings[2]["seconds"]
    assert all(one["images"] == 90 * (1_281_167 // 256) * 256 for one in retrainings)
    assert 0 < pruning["seconds"] < 60 and pruning["payload_sent_bytes"] == 0
    for key in ("seconds", "worker_seconds", "images", "payload_sent_bytes", "payload_received_bytes", "wire_bytes"):
        assert plan["sum"][key] == pytest.approx(sum(one[key] for one in plan["stages"]))
    assert plan["sum"]["worker_seconds"] == pytest.approx(4 * plan["sum"]["seconds"])
    (warning,) = plan["warnings"]
    assert warning.replace("pretrain preresnet18 with loft: ", "") == alone["warning"]
    assert not list(tmp_path.iterdir())


def test_its_first_line_is_the_answer_and_its_last_the_next_step(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run(["plan", "slurm/imagenet.sh", "--workers", "16", "--cluster", "infiniband-hdr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = planned(capsys, "slurm/imagenet.sh", "--workers", "16", "--cluster", "infiniband-hdr")
    assert (
        lines[0].startswith(f"slurm/imagenet.sh with 16 workers on 4 nodes: {plan['sum']['seconds'] / 3600:.3g} h, ")
        and "GPU-hours" in lines[0]
    )
    assert "--shard-data" in lines[1] and lines[1].startswith("WARNING")
    assert lines[-1] == "next: sbatch slurm/imagenet.sh"


SCRIPTS = sorted(file.name for file in (ROOT / "slurm").glob("*.sh") if file.stem not in ("common", "commcost"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_planned(capsys, monkeypatch, script):
    monkeypatch.chdir(ROOT)
    plan = planned(capsys, f"slurm/{script}")
    assert plan["sum"]["images"] > 0 and plan["sum"]["seconds"] is None and not plan["warnings"]


def test_options_add_to_those_of_the_script(monkeypatch):
    """More options do not take --shard-data away, without which 16 ranks take as long as 4."""
    monkeypatch.chdir(ROOT)
    environment = dict(os.environ) | {"LOFT_OPTIONS": "--checkpoint-every 200it", "LOFT_RETRAIN_OPTIONS": "--seed 3"}
    commands = read_script(Path("slurm/imagenet-nodes.sh"), environment, ROOT).commands
    pretrain, retrain = (next(words for words in commands if words[0] == name) for name in ("pretrain", "retrain"))
    assert "--shard-data" in pretrain and pretrain[pretrain.index("--checkpoint-every") + 1] == "200it"
    assert "--loader-workers" in retrain and retrain[retrain.index("--seed") + 1] == "3"


def test_variables_count_as_for_sbatch(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in {
        "LOFT_PRESET": "digits",
        "LOFT_OPTIONS": "--epochs 3 --shard-data",
        "LOFT_PRUNE_OPTIONS": "--ratio 0.4 --method bn-scale",
        "LOFT_RETRAIN_OPTIONS": "--epochs 7",
    }.items():
        monkeypatch.setenv(name, value)
    plan = planned(capsys, "slurm/cifar10.sh")
    pretraining, _, retraining = plan["stages"]
    assert pretraining["images"] == 3 * 4 * 32 * (1437 // 4 // 32) and retraining["images"] == 7 * 64 * (1437 // 64)
    assert retraining["stage"] == "retrain bn-scale, ratio 0.4"
    assert any("one ranking over all" in note for note in plan["notes"])


def test_searches_are_part_of_pruning(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOFT_PRUNE_OPTIONS", "--method gem-miner --ratio 0.5 --ratio 0.9 --search-epochs 4")
    plan = planned(capsys, "slurm/digits.sh", "--cluster", "ethernet-1g")
    options = ("--strategy", "data-parallel", "--epochs", "4", "--workers", "1", "--cluster", "ethernet-1g")
    dense = dry(capsys, "pretrain", "--preset", "digits", *options)
    searched = plan["stages"][1]
    assert searched["images"] == 2 * dense["images"]  # one for each ratio
    assert 0 < searched["seconds"] - 2 * dense["training_seconds"] < 0.1 * searched["seconds"]  # and evaluations
    assert searched["payload_sent_bytes"] == 0
    whole = dry(capsys, "pretrain", "--preset", "digits", "--workers", "4")["parameters"]
    steps = 10 * (1437 // 64)
    assert plan["stages"][2]["payload_sent_bytes"] == 4 * 4 * whole * steps  # a mask makes no network smaller


def test_gpus_that_would_idle_or_be_shared_are_told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for gpus, words in (("--gpus-per-node=4", "some would idle"), ("--gres=gpu:a100:1", "more ranks (4) than GPUs (2)")):
        (tmp_path / "job.sh").write_text(HEAD.replace("\n. ", f"\n#SBATCH {gpus}\n. ") + "find_tickets digits\n")
        (warning,) = planned(capsys, str(tmp_path / "job.sh"))["warnings"]
        assert words in warning
    (tmp_path / "job.sh").write_text(HEAD.replace("\n. ", "\n#SBATCH --gpus=4\n. ") + "find_tickets digits\n")
    assert planned(capsys, str(tmp_path / "job.sh"))["warnings"] == []


def test_ranks_lie_on_nodes_as_the_script_says(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    seconds = []
    for lines in ("--nodes=1 --ntasks=4", "--nodes=4 --ntasks-per-node=1"):
        text = f"#!/bin/bash\n#SBATCH {lines}\n{HEAD.splitlines()[-1]}\nfind_tickets cifar10-preresnet34\n"
        (tmp_path / "job.sh").write_text(text)
        seconds.append(planned(capsys, str(tmp_path / "job.sh"), "--cluster", "nvlink-hdr")["sum"]["seconds"])
    assert seconds[0] < seconds[1]


# -- nothing is run -----------------------------------------------------------------------------------------------


def test_nothing_that_a_script_names_is_run_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    before = sorted(tmp_path.rglob("*"))
    lines = HEAD.splitlines()
    own = [
        "touch by-name",
        f"{shutil.which('touch')} by-path",
        f"export PATH={os.environ['PATH']}",
        "touch by-path-again",
        "echo filled > slurm/common.sh",
        "echo more >> slurm/common.sh",
        "listed=$(ls / > found) && touch found",
        "cleans() { rm -r slurm; }; cleans",
        "export LOFT_OPTIONS='--epochs 3'",
    ]
    text = "\n".join([*lines[:3], *own, lines[3], "rm -r slurm", "find_tickets digits", "touch after", ""])
    script = tmp_path / "slurm" / "digits.sh"
    script.write_text(text)
    common = (tmp_path / "slurm/common.sh").read_text()
    made = read_script(script, dict(os.environ), tmp_path)
    assert [words[0] for words in made.commands] == ["pretrain", "prune", "retrain"] and made.commands[0][-2:] == [
        "--epochs",
        "3",
    ]
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "slurm/common.sh").read_text() == common


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("#!/bin/bash\necho hello\n", "does not source slurm/common.sh"),
        ("#!/bin/bash\n# . slurm/common.sh\n", "does not source slurm/common.sh"),
        (HEAD + "report_costs\n", "trains nothing"),
        (HEAD.replace("--nodes=2", "--nodes=many") + "find_tickets digits\n", "--nodes=many is no number"),
        (HEAD + "find_tickets nowhere\n", "nowhere"),
        (HEAD + "exit 3\n", "ends with 3"),
        (HEAD + "step loft prune RUN\ndraw_tickets RUN\n", "pretrains nothing before it prunes"),
        (HEAD + "train runs/x retrain runs/y/tickets/z\n", "is not there yet"),
    ],
)  # fmt: skip
def test_scripts_that_cannot_be_planned(capsys, monkeypatch, tmp_path, text, told):
    monkeypatch.chdir(ROOT)
    (tmp_path / "job.sh").write_text(text)
    assert run(["plan", str(tmp_path / "job.sh")]) in (1, 2)
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert run(["plan", str(tmp_path)]) == 2


def test_lines_for_sbatch_as_sbatch_reads_them():
    lines = ["-N2 --ntasks-per-node 4 -c 8 # for each", "--requeue"]
    text = "#!/bin/bash\n##SBATCH --nodes=9\n" + "".join(f"#SBATCH {line}\n" for line in lines)
    found = {"nodes": "2", "ntasks-per-node": "4", "cpus-per-task": "8", "requeue": ""}
    assert sbatch_options(f"{text}\necho\n#SBATCH -n 3\n") == found


# -- tickets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TICKETS)
def test_a_ticket_is_as_large_as_was_expected_before_it_was_drawn(trained, name):
    ticket = Ticket.read(trained / "tickets" / name)
    made = ticket.provenance
    options = {key: made[key] for key in ("unit", "round_to", "criterion") if key in made}
    case = Case.of(settings_of(Run.open(trained)))
    expected = expected_ticket(case, Pruning.of(made["ratio"], made["method"], **options), made["blocks"])
    real = Case(case.settings, case.shape, ticket.architecture, ticket.hidden_widths)
    if made["method"] != "layers":  # which blocks go is not known before, and their parameters differ
        assert expected.size == real.size
    assert sum(expected.network.blocks) == sum(ticket.architecture.blocks)
    assert expected.masked == (ticket.mask.weights is not None)


def test_a_retraining_is_planned_as_it_would_be_done(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ticket = trained / "tickets" / "magnitude-l2-0.5-by4"
    before = sorted(trained.rglob("*"))
    plan = dry(
        capsys,
        "retrain",
        str(ticket),
        "--workers",
        "3",
        "--batch-size",
        "48",
        "--epochs",
        "2",
        "--cluster",
        "ethernet-1g",
    )
    parameters = sum(tensor.numel() for tensor in parameters_of(Ticket.read(ticket).state).values())
    steps = 2 * (1437 // 48)
    assert plan["parameters"] == parameters and plan["steps"] == steps and plan["images"] == steps * 48
    assert plan["training"]["payload_sent_bytes"] == steps * 3 * 4 * parameters
    (rank,) = plan["memory"]
    assert rank["parameters_bytes"] == 4 * parameters and rank["input_batch_bytes"] == 16 * (4 * 64 + 8)
    assert rank["mask_bytes"] == 0
    size = Case.of(settings_of(Run.open(trained))).size.flops
    dense_seconds = 3 * size * 48 / 3 * steps / 2 / Cluster.read("ethernet-1g").flops_per_second
    assert 0 < plan["epoch_compute_seconds"] < dense_seconds
    assert plan["recipe"]["dataset"] == {"value": "digits", "source": "ticket"}
    assert plan["recipe"]["epochs"]["source"] == "typed"
    assert sorted(trained.rglob("*")) == before and not list(tmp_path.iterdir())
    masked = dry(capsys, "retrain", str(trained / "tickets" / "magnitude-weights-0.9"), "--workers", "2")
    assert masked["memory"][0]["mask_bytes"] == 4 * masked["parameters"]
    halves, quarters = (
        dry(capsys, "retrain", str(ticket), "--workers", "2", "--batch-size", "48", "--batch-parts", parts)["memory"][0]
        for parts in ("2", "4")
    )
    assert quarters["input_batch_bytes"] == halves["input_batch_bytes"] == 24 * (4 * 64 + 8)
    assert quarters["activations_bytes"] < 0.6 * halves["activations_bytes"]  # its two parts, one after the other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--dataset", "cifar10"), "images of 3 channels"),
        (("--rewind", "epoch:7"), "epoch"),
        (("--batch-parts", "2", "--workers", "3"), "give at least 3"),
        (("--resume", "--run", "x"), "omit --resume"),
    ],
)
def test_what_a_retraining_refuses_its_plan_refuses(capsys, trained, options, told):
    assert run(["retrain", str(trained / "tickets" / "magnitude-l2-0.5-by4"), "--dry-run", *options]) in (1, 2)
    printed = capsys.readouterr()
    assert told in printed.err and not printed.out


def test_other_classes_are_planned_with_a_new_classifier(capsys, trained):
    ticket = str(trained / "tickets" / "magnitude-l2-0.5-by4")
    own, other = dry(capsys, "retrain", ticket), dry(capsys, "retrain", ticket, "--dataset", "textures")
    assert other["parameters"] - own["parameters"] == 8 * (64 + 1)  # 18 classes in place of 10
    with pytest.raises(LoftError, match="describe imagenet or imagefolder"):
        data_shape(ticket_data(Ticket.read(Path(ticket))), 3, 30)
