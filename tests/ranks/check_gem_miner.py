"""That Gem-Miner finds something: on digits at 1.44 % density, against its own shuffled mask and random weights, fixed seeds, a stated margin.

bin/bench search prints such figures: leads of twenty points and more. The margin leaves room for other processors' rounding, after which a
search of some hundred steps ends in another ticket of the same quality.
"""

import statistics

from mpi4py import MPI

from loft_hpc.cli.main import run
from loft_hpc.comm.alone import Alone
from loft_hpc.data.order import Order
from loft_hpc.data.registry import open_data
from loft_hpc.jobs.check import variants_of
from loft_hpc.jobs.retrain import ticket_data
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.evaluation import judge, network_for
from loft_hpc.training.settings import Computation, Evaluation, Optimisation

from tiny import CPU

SIZES = (2,)
MARGIN = 8
"""Percentage points, in the mean over the seeds."""


def test_its_ticket_beats_its_shuffled_mask_and_random_weights(world, tmp_path_factory):
    folder = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("gem") if world.rank == 0 else None)
    options = ("--model", "resnet20", "--batch-size", "32", "--epochs", "1", "--snapshot-every", "0", "--run", str(folder / "run"))
    assert run(["pretrain", "--strategy", "data-parallel", *options]) == 0
    search = ("--method", "gem-miner", "--ratio", "0.9856", "--search-epochs", "10", "--batch-parts", "2", "--name", "gem")
    assert run(["prune", str(folder / "run"), *search]) == 0
    world.barrier()
    ticket = Ticket.read(folder / "run" / "tickets" / "gem")
    assert ticket.mask.count == ticket.mask.total - int(0.9856 * ticket.mask.total)
    alone, seed, variants = Alone(world), world.rank, variants_of(ticket, "none")
    data = open_data(ticket_data(ticket), CPU, alone)

    def finetuned(variant: Ticket) -> float:
        order = Order("split", data.info.train_images, 32, seed, 0, 1)
        training = DataParallel(
            variant.architecture, None, variant.state, Optimisation(lr=0.1), data, order, 2 * order.steps_per_epoch, Computation(), CPU, alone,
            variant.mask.weights,
        )  # fmt: skip
        while training.advance().step < training.total_steps:
            pass
        network = network_for(variant.architecture, None, training.full_state(), CPU, "")
        return 100 * judge(network, data, Evaluation(), alone).accuracy

    mine = {name: finetuned(variants[name](seed)) for name in ("ticket", "shuffled", "random")}
    found = MPI.COMM_WORLD.allgather(mine)
    means = {name: statistics.mean(accuracies[name] for accuracies in found) for name in mine}
    assert means["ticket"] >= means["shuffled"] + MARGIN and means["ticket"] >= means["random"] + MARGIN, found
