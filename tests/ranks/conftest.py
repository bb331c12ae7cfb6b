"""Inside mpirun: one world for the session, and a rank whose test fails ends the job, so that the others do not wait for it."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from loft_hpc.cli import main
from loft_hpc.comm.start import start
from loft_hpc.comm.world import World
from loft_hpc.training.device import place

torch.set_num_threads(1)
main.RANK_0_SPEAKS_SECONDS = 0  # processes that a failure ends wait for rank 0's line; these go on
_world: list[World] = []
_outcomes: dict[str, Counter] = {}
"""By file: how many checks passed and failed on this rank, and the seconds that they took."""


@pytest.fixture(scope="session")
def world() -> World:
    if not _world:
        _world.append(start())
        place("cpu", "float32", _world[0])
    return _world[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes = _outcomes.setdefault(report.location[0].rpartition("/")[2], Counter())
    outcomes["seconds"] += report.duration
    if report.failed or report.when == "call":
        outcomes[report.outcome] += 1
    if report.failed and _world and _world[0].size > 1:
        print(
            f"\nrank {_world[0].rank}: {report.nodeid} ({report.when})\n{report.longreprtext}",
            file=sys.stdout,
            flush=True,
        )
        if not _world[0].failed_together(1.0):
            _world[0].abort(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    """At a file's end, what tests/test_ranks.py reads: a job that is aborted later leaves it.

    pytest calls this one for the tests of every folder, once this file was read.
    """
    done = yield
    if item.path.parent == Path(__file__).parent and (nextitem is None or nextitem.path != item.path):
        outcomes = _outcomes[item.path.name]
        print(
            f"\nranks: {item.path.name}: {outcomes['passed']} passed, {outcomes['failed']} failed in {outcomes['seconds']:.0f} s",
            flush=True,
        )
    return done
