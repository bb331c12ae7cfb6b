"""What blocks are worth does not depend on how many ranks look at the batches."""

import pytest
from mpi4py import MPI

from loft_hpc.comm.alone import Alone
from loft_hpc.comm.ledger import Ledger
from loft_hpc.data.embedded import digits
from loft_hpc.models.resnet import build
from loft_hpc.tickets.block_scores import BLOCK_CRITERIA, BlockScoring, removable
from loft_hpc.training.evaluation import reestimate_statistics
from loft_hpc.training.settings import Evaluation

from tiny import CPU, tiny

SIZES = (3,)


@pytest.fixture(scope="module")
def alone(world):
    """A world of this rank only, for which the plain loop over all batches is one process's."""
    return Alone(world)


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize(
    ("batches", "batch_size"), [(5, 32), (1, 50), (8, 200)], ids=["uneven shares", "a rank without", "an incomplete batch, and bounds"]
)
@pytest.mark.parametrize("criterion", BLOCK_CRITERIA)
def test_scores_are_those_of_one_process(world, alone, criterion, batches, batch_size, pre_activation):
    data, network, scoring = digits(CPU), build(tiny(pre_activation), seed=1), BlockScoring(batches, batch_size, seed=7)
    reestimate_statistics(network, data, Evaluation(statistics_batches=3, statistics_batch=32), world)
    world.ledger = Ledger()
    together = BLOCK_CRITERIA[criterion](network, data, scoring, world)
    assert {purpose for purposes in world.ledger.entries.values() for purpose in purposes} <= {"control"}
    assert list(together) == removable(tiny(pre_activation))
    assert together == pytest.approx(BLOCK_CRITERIA[criterion](network, data, scoring, alone), rel=1e-4)
    assert all(scores == together for scores in MPI.COMM_WORLD.allgather(together))
