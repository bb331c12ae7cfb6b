"""Data-parallel training and evaluation over real ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn

from loft_hpc.comm.ledger import Ledger
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.models.resnet import build
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.evaluation import judge, network_for, reestimate_statistics
from loft_hpc.training.settings import Computation, Evaluation, Optimisation

from tiny import CPU, initial_state, tiny

SIZES = (1, 4)
BATCH = 10  # not divisible by 3 or 4: the ranks' parts are uneven


def make(world, steps=4):
    data = digits(CPU)
    order = Order("split", data.info.train_images, BATCH, 3, world.rank, world.size)
    return DataParallel(tiny(), None, initial_state(tiny()), Optimisation(lr=0.1), data, order, steps, Computation(), CPU, world)


def test_one_step_equals_the_mean_loss_over_the_whole_batch(world):
    """A single process computes every rank's part with that part's normalisation statistics, and steps on their sum."""
    training = make(world, steps=1)
    training.advance()
    data, network = digits(CPU), network_for(tiny(), None, initial_state(tiny()), CPU, "")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for rank in range(world.size):
        order = Order("split", data.info.train_images, BATCH, 3, rank, world.size)
        images, labels = next(data.train_batches(order, 0, 1))
        (F.cross_entropy(network(images), labels, reduction="sum") / BATCH).backward()
    sgd.step()
    state = training.full_state()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_the_ranks_parts_make_up_the_batch(world):
    order = Order("split", 100, BATCH, 3, world.rank, world.size)
    everybody = np.concatenate(MPI.COMM_WORLD.allgather(order.indices(4).numpy()))
    alone = Order("split", 100, BATCH, 3, 0, 1).indices(4).numpy()
    assert sorted(everybody) == sorted(alone)


def test_ranks_stay_alike_and_the_ledger_counts_the_gradient(world):
    world.ledger = Ledger()
    training = make(world)
    training.advance()
    states = MPI.COMM_WORLD.allgather({name: tensor.numpy() for name, tensor in training.full_state().items()})
    assert all(np.array_equal(states[0][name], state[name]) for state in states for name in state)
    parameters = sum(tensor.numel() for tensor in training.full_state().values())
    expected = 0 if world.size == 1 else 4 * 4 * parameters
    assert world.ledger.entry("allreduce", "gradient").payload_sent_bytes == expected


def test_checkpoint_continues_bitwise(world):
    whole, second = make(world, 12), make(world, 12)
    whole.advance()
    tensors, progress = whole.checkpoint()
    second.restore(Checkpoint(8, tensors, [], progress))
    whole.advance()
    second.advance()
    one, other = whole.full_state(), second.full_state()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_statistics_are_those_of_one_process_going_through_all_batches(world):
    settings = Evaluation(statistics_batches=5, statistics_batch=64)
    data, network, plain = digits(CPU), build(tiny(), seed=1), build(tiny(), seed=1)
    reestimate_statistics(network, data, settings, world)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for images, _ in data.calibration_batches(5, 64, 0, 1):
            plain.train()(images)
    for (name, mine), theirs in zip(network.named_buffers(), plain.buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    everybody = MPI.COMM_WORLD.allgather([buffer.numpy() for name, buffer in network.named_buffers() if "running" in name])
    assert all(np.array_equal(mine, first) for rank in everybody for mine, first in zip(rank, everybody[0], strict=True))


@pytest.mark.parametrize("batch", [7, 360])
def test_every_test_image_is_judged_once(world, batch):
    data, network = digits(CPU), build(tiny(), seed=1)
    score = judge(network, data, Evaluation(evaluation_batch=batch), world)
    images, labels = data._test
    with torch.no_grad():
        output = network.eval()(images)
    assert score.images == 360
    assert abs(score.correct - int((output.argmax(1) == labels).sum())) <= 1  # one near-tie may fall either way
    assert abs(score.loss - float(F.cross_entropy(output, labels))) < 1e-4
