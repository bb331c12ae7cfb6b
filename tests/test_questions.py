"""What a newcomer asks, asked as the README says: the first line answers, the last one is the next step, and nothing unequal is compared."""

import json
import re
import shlex
from pathlib import Path

import pytest

from loft_hpc.cli.main import run
from loft_hpc.runs.run import Run

TINY = ("--model", "resnet20", "--widen", "0.25")
SHORT = ("--batch-size", "512", "--statistics-batches", "2", "--device", "cpu")
QUICK = ("--repetitions", "2", "--no-energy", "--no-robustness", "--device", "cpu")
CHECKED = "runs/RUN/tickets/magnitude-l2-0.5"
TICKET = "runs/RUN/tickets/magnitude-l2-0.8"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with runs/RUN, two of its tickets, and one of them retrained."""
    folder = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["pretrain", *TINY, "--epochs", "4", "--local-iterations", "1", *SHORT, "--run", "runs/RUN"]) == 0
        assert run(["prune", "runs/RUN", "--ratio", "0.8", "--ratio", "0.5", "--device", "cpu"]) == 0
        assert run(["prune", "runs/RUN", "--ratio", "0.8", "--method", "random", "--at", "init", "--device", "cpu"]) == 0
        assert run(["retrain", TICKET, "--epochs", "2", "--lr", "0.05", *SHORT, "--run", "runs/RETRAINED"]) == 0
    return folder


@pytest.fixture
def ask(home, monkeypatch, capsys):
    """Runs a command in that folder; the lines that it printed."""
    monkeypatch.chdir(home)
    capsys.readouterr()

    def lines(*command: str, code: int = 0) -> list[str]:
        assert run(list(command)) == code
        printed = capsys.readouterr()
        return (printed.err if code else printed.out).strip().splitlines()

    return lines


def test_pretraining_says_what_it_was_and_what_comes_next(ask):
    lines = ask("pretrain", *TINY, "--epochs", "1", *SHORT, "--run", "runs/AGAIN")
    assert any("ordinary training" in line for line in lines)  # one rank alone
    assert lines[-1] == "next: loft prune runs/AGAIN"
    assert "rankings" not in "".join(lines)  # two snapshots tell nothing
    pruned = ask(*shlex.split(lines[-1])[2:], "--ratio", "0.5", "--device", "cpu")
    assert "tickets start from the trained weights" in pruned and pruned[-1].endswith("loft retrain runs/AGAIN/tickets/magnitude-l2-0.5")
    assert any("tickets start from the initial weights" in line for line in
               ask("prune", "runs/AGAIN", "--ratio", "0.5", "--method", "random", "--at", "init", "--device", "cpu"))  # fmt: skip


def test_is_it_a_winning_ticket(ask):
    lines = ask("check", CHECKED, "--seeds", "1", "--epochs", "1", *SHORT)
    lines = lines[next(place for place, line in enumerate(lines) if line.startswith("verdict")) :]
    assert lines[0].startswith("verdict: inconclusive (") and "--seeds 3" in lines[0]
    assert "trained weights, 1 seed" in lines[1] and lines[-1].startswith("next: the same command with --seeds 3")
    classical = json.loads("\n".join(ask("check", CHECKED, "--test", "classical", "--seeds", "2", "--epochs", "1",
                                         *SHORT, "--format", "json")))  # fmt: skip
    assert classical["start"] == "initial"
    found = {variant["variant"]: variant for variant in classical["variants"]}
    ticket = found["ticket"]
    for name in ("shuffled", "reinitialised", "inverted"):
        assert (found[name]["parameters"], found[name]["flops"]) == (ticket["parameters"], ticket["flops"])
    assert found["random"]["parameters"] == pytest.approx(ticket["parameters"], rel=0.05)
    assert {variant["passed"] for name, variant in found.items() if name != "ticket"} <= {"yes", "no", "open"}
    # all of them started where they say
    initial = Run.open(Path("runs/RUN")).snapshots.read("epoch-000")
    dense = Run.open(Path(CHECKED) / "checks/classical/dense-seed0").snapshots.read("epoch-000")
    assert all((dense[name] == initial[name]).all() for name in initial)


def test_only_what_had_the_same_training_is_compared(ask, home):
    """The column is empty until the command that is printed has been given, and then it is the difference of the two."""
    lines = ask("compare", "runs/RUN", TICKET, *QUICK)
    tables = [place for place, line in enumerate(lines) if line.startswith(("pretrained, ", "retrained from the trained weights, "))]
    assert len(tables) == 2
    (command,) = [line.split(": ", 1)[1] for line in lines if line.startswith("against dense is empty")]
    before = json.loads("\n".join(ask("compare", TICKET, *QUICK, "--format", "json")))["tickets"]
    assert [entry["against_dense_points"] for entry in before] == [None] and before[0]["start"] == "trained"
    assert before[0]["training_images"] == 4 * (1437 // 512) * 512 + 2 * (1437 // 512) * 512
    assert re.fullmatch(r"loft retrain \S*RUN --dense .*--epochs 2 .*--lr 0.05.*", command) and "--dataset" not in command
    told = ask(*shlex.split(command)[1:], "--device", "cpu", "--run", "runs/DENSE")
    assert told[-1].startswith("next: loft compare runs/DENSE")
    after = {
        entry["kind"]: entry for entry in json.loads("\n".join(ask("compare", "runs/DENSE", TICKET, *QUICK, "--format", "json")))["tickets"]
    }
    difference = 100 * (Run.open(Path("runs/RETRAINED")).accuracy - Run.open(Path("runs/DENSE")).accuracy)
    assert after["filter"]["against_dense_points"] == pytest.approx(difference) and after["filter"]["dense_command"] is None
    assert after["dense"]["training_images"] == after["filter"]["training_images"] and after["dense"]["budget"] == after["filter"]["budget"]
    # another seed of the ticket has no counterpart, and takes the comparison from its group
    ask("retrain", TICKET, "--epochs", "2", "--lr", "0.05", "--seed", "1", *SHORT, "--run", "runs/OTHER")
    both = json.loads("\n".join(ask("compare", TICKET, *QUICK, "--format", "json")))["tickets"]
    assert [(entry["runs"], entry["against_dense_points"]) for entry in both] == [(2, None)]


def test_all_that_lies_in_runs_can_be_compared(ask, home):
    """What is no run, or not finished, is passed over with a note; a name that does not exist is a mistake."""
    (home / "runs/notes").mkdir(exist_ok=True)
    lines = ask("compare", "runs/RUN", "runs/RETRAINED", "runs/notes", *QUICK)
    assert "note: runs/notes is passed over: it is no run" in lines
    assert lines[-1].startswith(f"next: loft check {TICKET} ")
    assert "runs/nowhere is no folder" in ask("compare", "runs/RUN", "runs/nowhere", code=1)[0]
    assert "was not retrained yet: loft retrain" in ask("compare", "runs/RUN/tickets/random-seed0-0.8-init", code=1)[0]


def test_what_leaves_untrained_is_said(ask):
    """The file of a ticket has the weights that it was pruned with; that of its retraining is another."""
    (untrained,) = [line for line in ask("export", TICKET, "--output", "ticket.safetensors") if line.startswith("test accuracy")]
    (trained,) = [line for line in ask("export", "runs/RETRAINED", "--output", "run.safetensors") if line.startswith("test accuracy")]
    assert "the ticket as it was pruned" in untrained and trained.endswith(")")


def test_could_it_have_stopped(ask):
    command = ("sweep", "runs/RUN", "--ratio", "0.8", "--at", "epoch:2", "--at", "epoch:4", "--epochs", "1", *SHORT)
    lines = ask(*command)
    assert "it is empty where that was not trained: give the same command with --dense" in lines
    assert re.match(r"(data-parallel|loft)\+1, 75 % \(asked 80 %\) pruned \(1 run\): .*pretraining could", lines[-1])
    points = json.loads("\n".join(ask(*command, "--dense", "--format", "json")))["points"]
    for point in points:
        dense = Run.open(Path("runs/RUN/sweeps/default") / f"dense-{point['snapshot'].replace(':', '-')}")
        assert point["dense_accuracy"] == dense.accuracy and dense.configuration["rewind"] == point["snapshot"]
    lines = ask(*command, "--dense")
    assert not any("empty" in line for line in lines)


def test_a_start_that_is_refused_leaves_no_folder(ask, home):
    before = sorted((home / "runs").iterdir())
    ask("pretrain", "--dataset", "imagefolder", "--data-dir", "nowhere", code=1)
    ask("pretrain", *TINY, "--batch-size", "5000", code=2)
    ask("retrain", TICKET, "--dataset", "imagefolder", "--data-dir", "nowhere", code=1)
    assert sorted((home / "runs").iterdir()) == before
