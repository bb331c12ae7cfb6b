"""That LoFT learns, and that what it ranks means something: on real digits, one training seed.

docs/results.md has the figures behind the margins. These leave room for other processors' rounding: after a few hundred steps it
makes another network of the same quality.
"""

import statistics
from pathlib import Path

import pytest
from mpi4py import MPI

from loft_hpc.cli.main import run
from loft_hpc.data.registry import open_data
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.models.groups import filter_groups, slice_state
from loft_hpc.runs.run import Run
from loft_hpc.tickets.finders.magnitude import MagnitudeOptions, largest_filters
from loft_hpc.tickets.finders.random import random_filters
from loft_hpc.training.evaluation import judge, network_for

from tiny import CPU

SIZES = (4,)
SEEDS = (1,)
DRAWS = range(5)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> list[Run]:
    """A pretraining run for each seed."""
    folder: Path = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("learning") if world.rank == 0 else None)
    for seed in SEEDS:
        recipe = [
            "--model",
            "resnet20",
            "--widen",
            "4",
            "--lr",
            "0.1",
            "--batch-size",
            "32",
            "--evaluate-every",
            "10",
            "--snapshot-every",
            "0",
            "--seed",
            str(seed),
        ]
        assert run(["pretrain", *recipe, "--run", str(folder / str(seed))]) == 0
    return [Run.open(folder / str(seed)) for seed in SEEDS]


@pytest.fixture(scope="session")
def advantage(world, trained):
    """Per run, points by which the largest filters beat the mean of random tickets of equal size, before any retraining."""

    def of_run(origin: Run, ratio: float, scope: str) -> float:
        state, groups, settings = origin.read_model(), filter_groups(origin.architecture), settings_of(origin)
        data = open_data(settings.data, CPU, world)

        def score(selection) -> float:
            widths = {name: len(kept) for name, kept in selection.items()}
            network = network_for(origin.architecture, widths, slice_state(state, selection, groups), CPU, "the ticket")
            return 100 * judge(network, data, settings.evaluation, world).accuracy

        largest = largest_filters(state, groups, ratio, MagnitudeOptions(scope=scope))
        drawn = [random_filters(groups, ratio, seed) for seed in DRAWS]
        kept = sum(map(len, largest.values()))
        assert all(abs(sum(map(len, one.values())) - kept) <= len(groups) for one in drawn)  # whole filters in every group
        return score(largest) - statistics.mean(map(score, drawn))

    return lambda ratio, scope: [of_run(origin, ratio, scope) for origin in trained]


def accuracy(path: Path) -> float:
    return 100 * Run.open(path).description["results"]["accuracy"]


def test_merged_networks_learn(trained):
    assert min(accuracy(origin.path) for origin in trained) >= 97


def test_half_ticket_after_retraining_is_within_a_point(world, trained):
    origin = trained[0].path
    assert run(["prune", str(origin), "--ratio", "0.5"]) == 0
    retrained = origin.with_name("retrained")
    assert run(["retrain", str(origin / "tickets" / "magnitude-l2-0.5"), "--evaluate-every", "10", "--run", str(retrained)]) == 0
    world.barrier()
    assert accuracy(retrained) >= accuracy(origin) - 1


def test_largest_filters_over_all_blocks_beat_random_tickets(advantage):
    """23 +- 22 points over three seeds in docs/results.md: the margin is there on any processor, its size is not."""
    assert statistics.mean(advantage(0.8, "global")) > 0
