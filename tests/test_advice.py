"""What an error message advises is done here as it stands there: it must work."""

import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from loft_hpc.cli.main import INTERRUPTED, run
from loft_hpc.errors import LoftError
from loft_hpc.models.scores import removed_count
from loft_hpc.tickets.counts import kept_of_all, kept_of_each, largest_of_all, least_ratio
from loft_hpc.training.interruption import Interruption

SMALL = "--model resnet20 --batch-size 64 --statistics-batches 1"
PLAN = "pretrain --model resnet20 --dry-run"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with runs/loft, of snapshots 0, 8, 14 and 18, its ticket half, and runs/parallel."""
    folder = tmp_path_factory.mktemp("advice")
    assert run(shlex.split(f"pretrain {SMALL} --rounds 9 --local-iterations 2 --snapshot-every 7it --run {folder}/loft")) == 0
    assert run(shlex.split(f"pretrain {SMALL} --epochs 1 --strategy data-parallel --run {folder}/parallel")) == 0
    assert run(shlex.split(f"prune {folder}/loft --ratio 0.5 --name half")) == 0
    return folder


def failed(capsys, command: str, code: int | None = None) -> str:
    """What a command says that fails: one line."""
    capsys.readouterr()
    ended = run(shlex.split(command))
    line = capsys.readouterr().err.strip()
    assert ended in ((1, 2) if code is None else (code,)) and line.startswith("loft: ") and "\n" not in line, line
    return line


def works(capsys, command: str) -> None:
    assert run(shlex.split(command)) == 0, f"{command}: {capsys.readouterr().err}"


ADVICE = [
    # what fails, what of its message is advice, what follows it
    (f"pretrain {SMALL} --rounds 1 --run RUN", r"go on with it by (--resume)", "pretrain --run RUN {}"),
    ("prune RUN --ratio 0.5 --name half", r"name another with (--name)", "prune RUN --ratio 0.5 {} other"),
    ("prune RUN --unit weights --scope global --ratio 0.9999999", r"give (--ratio \S+) or less", "prune RUN --unit weights --scope global {}"),
    ("prune RUN --unit weights --ratio 0.99999", r"give (--ratio \S+) or less", "prune RUN --unit weights {}"),
    ("prune RUN --scope global --floor 0.3 --ratio 0.8", r"give (--ratio \S+) or less", "prune RUN --scope global --floor 0.3 {}"),
    ("prune RUN --method layers --ratio 0.01", r"give (--ratio \S+) or more", "prune RUN --method layers --criterion l1 {}"),
    ("prune RUN --method imp --ratio 0.5 --rewind-to 7it", r"give (--rewind-to \w+)", "prune RUN --method imp --ratio 0.5 --search-epochs 1 {}"),
    ("prune RUN --method early-bird --ratio 0.7", r"lower (--patience) below 4 and raise (--tolerance)", "prune RUN --method early-bird --ratio 0.7 {} 3 {} 1"),
    ("prune PARALLEL --method loft --ratio 0.3", r"use (--method magnitude)", "prune PARALLEL {} --ratio 0.3"),
    ("prune RUN --method random --profile smart-ratio --ratio 0.4", r"give (--unit weights)", "prune RUN --method random --profile smart-ratio --ratio 0.4 {}"),
    ("prune RUN --at epoch:7 --ratio 0.6", r"there are \S+, (\S+),", "prune RUN --ratio 0.6 --at {}"),
    ("prune RUN --freeze-every 2 --ratio 0.6", r"belongs to (--method gem-miner)", "prune RUN {} --freeze-every 2 --ratio 0.6 --search-epochs 1"),
    (f"{PLAN} --strategy gpipe --workers 4 --epochs 1", r"use (--split balanced)", f"{PLAN} --strategy gpipe --workers 4 --epochs 1 {{}}"),
    (f"{PLAN} --strategy gpipe --split balanced --workers 99", r"start at most (\d+)", f"{PLAN} --strategy gpipe --split balanced --workers {{}}"),
    (f"{PLAN} --workers 99", r"start at most (\d+)", f"{PLAN} --workers {{}}"),
    (f"{PLAN} --strategy gpipe --rounds 3", r"use (--epochs) with (--strategy gpipe)", f"{PLAN} {{}} 3 {{}}"),
    (f"{PLAN} --stop-when-stable --snapshot-every 0", r"for instance (\w+)", f"{PLAN} --stop-when-stable --snapshot-every {{}}"),
    (f"{PLAN} --patience 2", r"belongs to (--stop-when-stable)", f"{PLAN} {{}} --patience 2"),
    (f"{PLAN} --cluster nowhere", r"one of the examples ([\w-]+)", f"{PLAN} --cluster {{}}"),
    ("commcost --workers 2 --plot costs.jpg", r"must end in (\.\w+), (\.\w+) or (\.\w+)", "commcost --workers 2 --plot FOLDER/costs{2}"),
    ("measure RUN/tickets/half --distance-to final", r"the folder that loft (pretrain) printed", "measure RUN --distance-to final"),
    ("measure RUN --ratio 0.5", r"belongs to (--distance-to)", "measure RUN --ratio 0.5 {} final"),
    ("theory --patch-size 3", r"give 1, (\d), 4 or 8", "theory --filters 8 --workers 2 --images 4 --steps 2 --starts 2 --deals 2 --patch-size {}"),
]  # fmt: skip


@pytest.mark.parametrize(("fails", "advice", "follows"), ADVICE, ids=[fails for fails, _, _ in ADVICE])
def test_advice_in_a_message_works(made, tmp_path, capsys, fails, advice, follows):
    def placed(command: str) -> str:
        return command.replace("RUN", f"{made}/loft").replace("PARALLEL", f"{made}/parallel").replace("FOLDER", str(tmp_path))

    found = re.search(advice, failed(capsys, placed(fails)))
    works(capsys, placed(follows).format(*found.groups()))


def test_a_run_that_was_told_to_end_is_finished_as_it_says(tmp_path, capsys):
    path, told = tmp_path / "run", Interruption()
    told.requested = True  # by a signal that came before the first step
    assert run(shlex.split(f"pretrain {SMALL} --rounds 3 --local-iterations 1 --run {path}"), told) == INTERRUPTED
    assert "go on with --resume" in capsys.readouterr().err
    assert "finish it with --resume first" in failed(capsys, f"measure {path}")
    said = failed(capsys, f"sweep {path}")
    works(capsys, re.search(r"finish it with loft (.*) first", said)[1])
    works(capsys, f"prune {path} --ratio 0.5")


@pytest.mark.parametrize(
    ("file", "command"),
    [("snapshots/scores-000008.safetensors", "measure {} --distance-to final"), ("tickets/half/scores.safetensors", "measure {}/tickets/half")],
)  # fmt: skip
def test_what_may_be_removed_may_be_removed(made, tmp_path, capsys, file, command):
    path = shutil.copytree(made / "loft", tmp_path / "run")
    (path / file).write_bytes(b"torn")
    assert "restore it" in failed(capsys, command.format(path))
    (path / file).unlink()
    works(capsys, command.format(path))


def test_a_ticket_that_was_moved_away_is_moved_back(made, tmp_path, capsys):
    ticket = made / "loft" / "tickets" / "half"
    command = f"retrain {{}} --rewind init --epochs 1 --statistics-batches 1 --run {tmp_path}/run"
    shutil.move(ticket, tmp_path / "half")
    assert "move it back" in failed(capsys, command.format(tmp_path / "half"))
    shutil.move(tmp_path / "half", ticket)
    works(capsys, command.format(ticket))


@pytest.mark.parametrize("count", [kept_of_all, kept_of_each, largest_of_all])
def test_numbers_in_advice_are_rounded_to_the_side_that_works(count):
    draw = random.Random(0)
    for _ in range(300):
        layers = {number: np.arange(draw.randint(2, 3000), dtype=np.float64) for number in range(draw.randint(1, 9))}
        sizes = {name: len(scores) for name, scores in layers.items()}
        what = (layers, draw.choice([0.1, 1 / 3, 0.7]), 1) if count is largest_of_all else (sizes,)
        for ratio in (0.9999999, 0.95):
            try:
                count(what[0], ratio, *what[1:], "filters")
            except LoftError as told:
                advised = float(re.search(r"give --ratio (\S+) or less", str(told))[1])
                count(what[0], advised, *what[1:], "filters")


def test_the_least_ratio_of_blocks_that_is_advised_removes_one():
    assert all(removed_count(blocks, float(least_ratio(blocks))) == 1 for blocks in range(1, 200))
