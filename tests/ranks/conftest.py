"""Inside mpirun: one world for the session, and a rank whose test fails ends the job, so that the others do not wait for it."""

import sys

import pytest
import torch

from loft_hpc.comm.world import World, start
from loft_hpc.training.device import place

torch.set_num_threads(1)
_world: list[World] = []


@pytest.fixture(scope="session")
def world() -> World:
    if not _world:
        _world.append(start())
        place("cpu", "float32", _world[0])
    return _world[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and _world and _world[0].size > 1:
        print(f"\nrank {_world[0].rank}: {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.stdout, flush=True)
        if not _world[0].failed_together(1.0):
            _world[0].abort(1)
