"""The pipeline over real ranks: transparent (equal to one process that accumulates over the same micro-batches), counted, resumable."""

import pytest
import torch
import torch.nn.functional as F

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.messages import Messages
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.resnet import build
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Optimisation

from tiny import CPU, initial_state, make_gpipe, tiny

SIZES = (1, 3)
STEPS = 12


def one_process(architecture, micro_batches: int, steps: int) -> tuple[dict, dict]:
    """(gradients of the first step, parameters after `steps`) of plain torch: no buffers, stages or schedule of ours."""
    network = build(architecture)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(initial_state(architecture)[name])
    network = network.to(memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    data = digits(CPU)
    order = Order("replicated", data.info.train_images, 16, 5, 0, 1)
    first = {}
    for step, (images, labels) in enumerate(data.train_batches(order, 0, steps)):
        sgd.zero_grad()
        for part, wanted in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            (F.cross_entropy(network(part), wanted, reduction="sum") / len(labels)).backward()
        if step == 0:
            first = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        sgd.param_groups[0]["lr"] = Schedule(Optimisation(lr=0.1), STEPS, 1).lr_at(step)
        sgd.step()
    return first, dict(network.named_parameters())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_transparent_bitwise(world, micro_batches, pre_activation, recompute):
    """On one thread of a CPU all of it is the same arithmetic in the same order, so equality is to the last bit."""
    architecture = tiny(pre_activation)
    gradients, parameters = one_process(architecture, micro_batches, 8)
    training = make_gpipe(world, architecture, STEPS, micro_batches=micro_batches, recompute=recompute)
    images, labels = next(training._batches(1))
    training._pipeline.step(images, labels)
    mine = training._buffer.layout.views(training._buffer.gradient)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in mine.items())
    assert sorted(name for names in world.gather_objects(list(mine)) for name in names) == sorted(gradients)
    done = training.advance()
    assert done.step == 8
    state = training.full_state()
    assert all(torch.equal(state[name], parameters[name]) for name in parameters)


def test_every_cut_gives_the_same(world):
    by_hand = {1: "balanced", 2: "1", 3: "2,4", 4: "1,2,4"}[world.size]
    trainings = [make_gpipe(world, split=split) for split in ("balanced", by_hand)]
    for training in trainings:
        training.advance()
    one, other = (training.full_state() for training in trainings)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_travels_is_what_the_cuts_say(world):
    """Per step and cut: a batch's activations forward, their gradients back, 4 bytes each."""
    training = make_gpipe(world, micro_batches=4)
    world.ledger = Ledger()
    training.advance()
    outputs = tiny().block_outputs(8)
    crossing = [16 * 4 * outputs[block - 1][0] * outputs[block - 1][1] * outputs[block - 1][2] for block in training.cuts]
    sent, received = (world.ledger.entry(operation, "activation") for operation in ("send", "receive"))
    if world.rank < world.size - 1:
        assert (sent.calls, sent.payload_sent_bytes, sent.wire_sent_bytes) == (8 * 4, 8 * crossing[world.rank], 8 * crossing[world.rank])
        assert world.ledger.entry("receive", "gradient").payload_received_bytes == 8 * crossing[world.rank]
    else:
        assert sent.calls == 0
    if world.rank:
        assert received.payload_received_bytes == world.ledger.entry("send", "gradient").payload_sent_bytes == 8 * crossing[world.rank - 1]
    else:
        assert received.calls == 0


def test_checkpoint_continues_bitwise(world):
    whole, first, second = (make_gpipe(world) for _ in range(3))
    for training in (whole, first):
        training.advance()
    tensors, progress = first.checkpoint()
    second.restore(Checkpoint(8, {name: tensor.clone() for name, tensor in tensors.items()}, [], progress))
    whole.advance()
    second.advance()
    one, other = whole.full_state(), second.full_state()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_buffers_are_allocated_once(world):
    training = make_gpipe(world)
    buffers = training._pipeline._inputs + training._pipeline._gradients
    addresses = [buffer.data_ptr() for buffer in buffers]
    training.advance()
    assert addresses == [buffer.data_ptr() for buffer in buffers]
    assert len(buffers) == 4 * ((world.rank > 0) + (world.rank < world.size - 1))


def test_messages_round_a_ring(world):
    if world.size == 1:
        pytest.skip("one rank alone has nobody to send to")
    messages = Messages(world)
    for tag in range(3):
        arrived = torch.zeros(5)
        waits = [
            messages.receive(arrived, (world.rank - 1) % world.size, tag, "control"),
            messages.send(torch.full((5,), float(world.rank + tag)), (world.rank + 1) % world.size, tag, "control"),
        ]
        for wait in waits:
            wait()
        assert torch.equal(arrived, torch.full((5,), float((world.rank - 1) % world.size + tag)))
    with pytest.raises(ValueError, match="contiguous"):
        messages.send(torch.zeros(4, 4).t(), 0, 9, "control")


def test_a_batch_that_micro_batches_do_not_divide(world):
    with pytest.raises(LoftError, match="cannot be cut into 3 equal micro-batches"):
        make_gpipe(world, micro_batches=3)
