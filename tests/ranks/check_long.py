"""More than a thousand rounds: memory does not grow."""

import gc
from pathlib import Path

import pytest
from mpi4py import MPI

from loft_hpc.cli.main import run
from loft_hpc.cli.progress import Progress
from loft_hpc.runs.run import Run

SIZES = (2,)
ROUNDS = 1200
WARM = 300
GROWTH_BYTES = 4 << 20
"""Five kilobytes a round would be more."""


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory) -> Path:
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("long")) if world.rank == 0 else None))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_does_not_grow(world, folder, monkeypatch):
    seen = {}
    advanced = Progress.advanced

    def watched(self: Progress, step: int, loss: float) -> None:
        advanced(self, step, loss)
        if step in (WARM, ROUNDS - 1):
            seen[step] = resident_bytes()

    monkeypatch.setattr(Progress, "advanced", watched)
    options = ["--model", "resnet20", "--widen", "0.25", "--batch-size", "2", "--local-iterations", "1", "--rounds", str(ROUNDS), "--check-ranks",
               "--evaluate-every", "100", "--statistics-batches", "2", "--snapshot-every", "50it", "--checkpoint-every", "100it"]  # fmt: skip
    assert run(["pretrain", *options, "--run", str(folder / "run")]) == 0
    world.barrier()
    assert seen[ROUNDS - 1] - seen[WARM] < GROWTH_BYTES, f"{(seen[ROUNDS - 1] - seen[WARM]) / 1e6:.1f} MB more after {ROUNDS} rounds"
    assert [event["round"] for event in Run.open(folder / "run").events("round")] == list(range(1, ROUNDS + 1))
