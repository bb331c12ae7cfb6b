"""Engines that are missing, cannot serve, or are not needed: under real mpirun, and in a process whose Python lacks packages."""

import json
import sys

import pytest

from launching import launch, loft, told

SHORT = ("--model", "resnet20", "--widen", "0.25", "--epochs", "1", "--batch-size", "512", "--statistics-batches", "2", "--device", "cpu")


def without(*packages: str, ranks: int = 0, command: tuple = (), seconds: float = 120):
    """loft in Pythons that lack these packages, as in an environment where they are not installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\nfrom loft_hpc.cli.main import run\nsys.exit(run(sys.argv[1:]))"
    return launch(ranks, sys.executable, "-c", program, *map(str, command), seconds=seconds)


def test_without_horovod_ranks_exchange_by_mpi4py(tmp_path):
    result = without("horovod", ranks=2, command=("pretrain", *SHORT, "--run", tmp_path / "run"))
    assert result.code == 0, result.err
    assert "over 2 ranks (mpi4py); an epoch is " in result.out
    description = json.loads((tmp_path / "run/run.json").read_text())
    assert description["engine"] == "mpi4py" and description["status"] == "done"
    resumed = loft("pretrain", "--run", tmp_path / "run", "--resume", "--engine", "mpi4py", ranks=2)
    assert resumed.code == 0, resumed.err  # which engine decides nothing: it may be named anew


def test_one_rank_needs_neither_mpi_nor_horovod(tmp_path):
    result = without("horovod", "mpi4py", "mpi4py.MPI", command=("pretrain", *SHORT, "--run", tmp_path / "run"))
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run/run.json").read_text())["engine"] is None
    pruned = without("horovod", "mpi4py", "mpi4py.MPI", command=("prune", tmp_path / "run", "--ratio", "0.5"))
    assert pruned.code == 0, pruned.err


@pytest.mark.parametrize(
    ("lacks", "options", "said"),
    [
        (("horovod",), ("--engine", "horovod"), "Horovod is not installed: run bin/setup, or give --engine mpi4py"),
        ((), ("--engine", "nccl", "--device", "cpu"), "--engine nccl needs a GPU for every rank, but they compute on CPUs"),
    ],
)
def test_an_engine_that_cannot_serve_is_one_line(tmp_path, lacks, options, said):
    result = without(*lacks, ranks=2, command=("pretrain", *SHORT, "--run", tmp_path / "run", *options))
    (line,) = told(result)
    assert result.code in (1, 2) and line.startswith(f"loft: {said}")
    assert not (tmp_path / "run").exists()
