"""The README's commands as written, in the order of the page, on the ranks that it names; options that shorten them are added."""

import glob
import os
import re
import shlex
from pathlib import Path

import pytest
from mpi4py import MPI

from loft_hpc.cli.main import run

from test_folders import make_colours

SIZES = (4,)
ROOT = Path(__file__).parents[2]
TRAINING = ["--epochs", "1", "--batch-size", "256", "--statistics-batches", "2", "--device", "cpu"]
SHORTER = {
    "pretrain": [*TRAINING, "--widen", "0.25"],
    "retrain": TRAINING,
    "check": [*TRAINING, "--seeds", "1"],
    "sweep": TRAINING,
    "compare": ["--repetitions", "2", "--no-energy", "--no-robustness"],
}
STANDS_FOR = {"METHOD": ["random"], "DIR": ["flowers"]}


def commands() -> list[str]:
    """What the section of the five questions tells to type: its block of commands, then those within its table and after it."""
    section = re.search(r"^## Five questions\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    found = re.findall(r"^    ((?:mpirun|loft) .*)$|`((?:mpirun -np 4 )?loft \w+ [^`]*)`", section, re.MULTILINE)
    return [block or inline for block, inline in found]


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory) -> Path:
    """A folder as the page assumes it: slurm/ of the checkout, and somebody's own images."""
    path: Path = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("readme") if world.rank == 0 else None)
    if world.rank == 0:
        (path / "slurm").symlink_to(ROOT / "slurm")
        make_colours(path / "flowers")
    world.barrier()
    return path


def test_the_page_has_them_all():
    assert {shlex.split(command.removeprefix("mpirun -np 4 "))[1] for command in commands()} >= {
        "pretrain", "prune", "retrain", "check", "sweep", "compare", "doctor", "plan", "commcost",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands())
def test_it_works_as_written(world, folder, command, capsys):
    os.chdir(folder)
    world.barrier()
    words = shlex.split(command.removeprefix("mpirun -np 4 "), comments=True)
    words = [argument for word in words for argument in STANDS_FOR.get(word, [word])]
    words = [argument for word in words for argument in (sorted(glob.glob(word)) or [word])]
    world.barrier()
    assert run([*words[1:], *SHORTER.get(words[1], [])]) == 0, (command, capsys.readouterr().err)
    world.barrier()
    assert not world.rank or not capsys.readouterr().out


def test_the_same_two_options_are_for_pretraining(world, folder):
    """As the page says of `loft doctor`."""
    (options,) = [command.split("doctor")[1] for command in commands() if command.startswith("loft doctor")]
    os.chdir(folder)
    assert run(["pretrain", *shlex.split(options.replace("DIR", "flowers")), *SHORTER["pretrain"],
                "--model", "resnet20", "--batch-size", "8", "--image-size", "32"]) == 0  # fmt: skip
    world.barrier()
