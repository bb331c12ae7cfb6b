"""LoFT's rounds over real ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI

from loft_hpc.analysis.traffic import as_ledger, division, loft_round
from loft_hpc.comm.ledger import Ledger
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.partition import deal
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Optimisation

from tiny import CPU, initial_state, make_loft, tiny

SIZES = (1, 3)

RULES = pytest.mark.parametrize("rule", ["paper", "all-blocks"])
MOMENTA = pytest.mark.parametrize("momentum", ["reset", "carry"])
EXCHANGED = pytest.mark.parametrize("exchange", ["allgather", "alltoall"])


def everybodys(world, state):
    """Every rank's copy of a state, as numpy arrays."""
    return MPI.COMM_WORLD.allgather({name: tensor.numpy() for name, tensor in state.items()})


@RULES
@MOMENTA
@EXCHANGED
def test_learning_rate_0_leaves_every_bit(world, rule, momentum, exchange):
    training = make_loft(world, lr=0.0, weight_decay=0.0, partition=rule, momentum_across_rounds=momentum, exchange=exchange)
    before = training.full_state()
    for _ in range(4):
        training.advance()
    after = training.full_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def named_momentum(training) -> dict[str, torch.Tensor]:
    """Momentum of a rank's own sub-network, by the parameters' names."""
    return {
        name: view.clone()
        for buffer in (training._sub.shared, training._sub.partitioned)
        for name, view in buffer.layout.views(buffer.momentum).items()
    }


@RULES
@EXCHANGED
@pytest.mark.parametrize(("pre_activation", "momentum"), [(False, "reset"), (True, "reset"), (False, "carry")])
def test_exchange_equals_an_oracle_in_numpy(world, rule, exchange, pre_activation, momentum):
    """Gather every rank's sub-network with mpi4py, merge it by hand, and compare with what the exchange made of it."""
    training = make_loft(world, tiny(pre_activation), partition=rule, momentum_across_rounds=momentum, exchange=exchange)
    groups = {group.name: group for group in training.groups}
    dimension = {name: (group, d) for group in groups.values() for name, d in group.members}
    for number in range(3):
        before_exchange = {}
        run = training._exchange.run

        def spy(old, new, average, run=run, seen=before_exchange):
            seen.update({name: parameter.detach().clone() for name, parameter in training._sub.network.named_parameters()})
            seen.update({f"momentum/{name}": tensor for name, tensor in named_momentum(training).items()})
            run(old, new, average)

        training._exchange.run = spy
        hands = deal(training.groups, world.size, 5, number)
        training.advance()
        training._exchange.run = run
        parts = everybodys(world, before_exchange)
        results = training.full_state()
        if momentum == "carry":
            merged = training._exchange.merge(training._deal, momentum=True)
            results |= {f"momentum/{name}": tensor for name, tensor in merged.items()}
            assert any(tensor.abs().max() > 0 for tensor in merged.values())
            check_redealt_momentum(world, training, merged, deal(training.groups, world.size, 5, number + 1))
        for name, tensor in results.items():
            if name.removeprefix("momentum/") in dimension:
                group, along = dimension[name.removeprefix("momentum/")]
                expected = np.full(tensor.shape, np.nan, dtype=np.float32)
                for part, hand in zip(parts, hands, strict=True):
                    where = [slice(None)] * expected.ndim
                    where[along] = hand[group.name].numpy()
                    expected[tuple(where)] = part[name]
                np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=name)
            else:
                expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
                np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def check_redealt_momentum(world, training, merged, hands):
    """The next sub-network's momentum is the new deal's part of the merged one."""
    dimension = {name: (group.name, d) for group in training.groups for name, d in group.members}
    for name, tensor in named_momentum(training).items():
        expected = merged[name]
        if name in dimension:
            expected = expected.index_select(dimension[name][1], hands[world.rank][dimension[name][0]])
        assert torch.equal(tensor, expected), name


def test_next_sub_network_is_the_new_deals_slice_of_the_merged_state(world):
    training = make_loft(world, partition="all-blocks")
    for number in range(1, 4):
        training.advance()
        full, hand = training.full_state(), deal(training.groups, world.size, 5, number)[world.rank]
        dimension = {name: (group.name, d) for group in training.groups for name, d in group.members}
        for name, parameter in training._sub.network.named_parameters():
            expected = full[name]
            if name in dimension:
                expected = expected.index_select(dimension[name][1], hand[dimension[name][0]])
            assert torch.equal(parameter, expected), name


@MOMENTA
def test_all_ranks_hold_the_same_after_each_round_and_twice_the_same(world, momentum):
    first, second = (make_loft(world, momentum_across_rounds=momentum) for _ in range(2))
    for _ in range(4):
        first.advance()
        states = everybodys(world, first.full_state())
        assert all(np.array_equal(states[0][name], state[name]) for state in states for name in state)
        second.advance()
    one, other = first.full_state(), second.full_state()
    assert all(torch.equal(one[name], other[name]) for name in one)


@RULES
@MOMENTA
@pytest.mark.parametrize("transport", ["float32", "bfloat16"])
def test_both_exchanges_learn_bitwise_the_same(world, rule, momentum, transport):
    settings = {"partition": rule, "momentum_across_rounds": momentum, "transport_dtype": transport}
    gathered, moved = (make_loft(world, exchange=exchange, **settings) for exchange in ("allgather", "alltoall"))
    for _ in range(4):
        gathered.advance()
        moved.advance()
        one, other = gathered.full_state(), moved.full_state()
        assert all(torch.equal(one[name], other[name]) for name in one)


@EXCHANGED
def test_bfloat16_rounds_what_travels_and_nothing_else(world, exchange):
    """A filter that stays keeps its float32, one that moves is rounded to nearest, shared ones get the rounded mean change."""
    if world.size == 1:
        pytest.skip("nothing travels in a world of one rank")
    training = make_loft(world, exchange=exchange, transport_dtype="bfloat16")
    old, new = (deal(training.groups, world.size, 5, number) for number in range(2))
    seen, start = {}, training.full_state()
    run = training._exchange.run

    def spy(*deals, **options):
        seen.update({name: parameter.detach().clone() for name, parameter in training._sub.network.named_parameters()})
        run(*deals, **options)

    training._exchange.run = spy
    training.advance()
    parts, result = everybodys(world, seen), training.full_state()
    for group in training.groups:
        kept = sum(len(np.intersect1d(old[rank][group.name], new[rank][group.name])) for rank in range(world.size))
        assert kept < group.width
        for worker, hand in enumerate(old):
            filters = hand[group.name]
            trained = torch.from_numpy(parts[worker][group.filters])
            stays = torch.isin(filters, new[worker][group.name]).view(-1, 1, 1, 1)
            assert torch.equal(result[group.filters][filters], torch.where(stays, trained, trained.bfloat16().float()))
    for name, parameter in training._sub.network.named_parameters():
        if name in training._sub.shared.views:
            changes = [(torch.from_numpy(part[name]) - start[name]).bfloat16().float() for part in parts]
            mean = torch.stack(changes).mean(0).bfloat16().float()
            torch.testing.assert_close(parameter, start[name] + mean, rtol=0, atol=float(2**-8 * mean.abs().max()))


@EXCHANGED
def test_averaging_every_third_round(world, exchange):
    """In between, the shared parameters are each worker's own; then they are the start plus the mean of the workers' changes."""
    training = make_loft(world, rounds=6, exchange=exchange, average_every=3)
    names = list(training._sub.shared.views)
    start = training.full_state()
    for number in range(1, 7):
        before = {}
        run = training._exchange.run

        def spy(*deals, run=run, seen=before, **options):
            seen.update({name: view.clone() for name, view in training._sub.shared.views.items()})
            run(*deals, **options)

        training._exchange.run = spy
        training.advance()
        training._exchange.run = run
        parts = everybodys(world, before)
        after = everybodys(world, {name: training._sub.shared.views[name].clone() for name in names})
        if number % 3 and world.size > 1:
            assert all(np.array_equal(part[name], own[name]) for part, own in zip(parts, after, strict=True) for name in names)
            assert not np.array_equal(after[0]["fc.weight"], after[1]["fc.weight"])
            with pytest.raises(RuntimeError, match="no full state before"):
                training.full_state()
        elif number % 3 == 0:
            for name in names:
                expected = start[name].double().numpy() + np.mean([part[name] - start[name].double().numpy() for part in parts], axis=0)
                for own in after:
                    np.testing.assert_allclose(own[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
            start = training.full_state()


@MOMENTA
def test_ledger_equals_the_formula_to_the_byte(world, momentum):
    for rule in ("paper", "all-blocks"):
        training = make_loft(world, partition=rule, momentum_across_rounds=momentum)
        world.ledger = Ledger()
        for _ in range(4):
            training.advance()
        total = Ledger()
        for ledger in world.gather_objects(world.ledger):
            total.add(ledger)
        copies = 2 if momentum == "carry" else 1
        expected = as_ledger([flow.times(4) for flow in loft_round(division(tiny(), rule), world.size, copies=copies)])
        for operation, purpose in (("allgather", "partitioned"), ("allreduce", "shared")):
            entry = total.entry(operation, purpose)
            assert entry.calls == (4 * world.size if world.size > 1 else 0)
            assert entry.poster_bytes == entry.payload_sent_bytes  # the poster's accounting: what workers upload
            assert replace(entry, calls=0, poster_bytes=0) == expected.entry(operation, purpose)


@EXCHANGED
def test_a_round_allocates_no_new_buffers(world, exchange):
    training = make_loft(world, exchange=exchange)
    buffers = [tensor for tensor in vars(training._exchange).values() if isinstance(tensor, torch.Tensor)]
    buffers += [training._sub.shared.content, training._sub.partitioned.content]
    addresses = [buffer.data_ptr() for buffer in buffers]
    parameters = [parameter.data_ptr() for parameter in training._sub.network.parameters()]
    for _ in range(3):
        training.advance()
    assert addresses == [buffer.data_ptr() for buffer in buffers]
    assert parameters == [parameter.data_ptr() for parameter in training._sub.network.parameters()]


@MOMENTA
@EXCHANGED
@pytest.mark.parametrize(("transport", "every"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_checkpoint_continues_bitwise(world, momentum, exchange, transport, every):
    settings = {"momentum_across_rounds": momentum, "exchange": exchange, "transport_dtype": transport, "average_every": every}
    whole, first, second = (make_loft(world, **settings) for _ in range(3))
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        first.advance()
    tensors, progress = first.checkpoint()
    second.restore(Checkpoint(6, {name: tensor.clone() for name, tensor in tensors.items()}, [], progress))
    for _ in range(2):
        second.advance()
    one, other = whole.full_state(), second.full_state()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("momentum", ["carry", "reset"])
def test_one_rank_equals_plain_sgd_bitwise(world, momentum):
    """Against torch's own SGD over the network's own parameters, without any of our buffers."""
    if world.size > 1:
        pytest.skip("a statement about one rank")
    training = make_loft(world, momentum_across_rounds=momentum)
    while training._step < training.total_steps:
        training.advance()

    network = build(tiny())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(initial_state(tiny())[name])
    network = network.to(memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    data = digits(CPU)
    order = Order("replicated", data.info.train_images, 16, 5, 0, 1)
    schedule = Schedule(Optimisation(lr=0.1, schedule="cosine"), training.total_steps, 1)
    for step, (images, labels) in enumerate(data.train_batches(order, 0, training.total_steps)):
        sgd.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        sgd.param_groups[0]["lr"] = schedule.lr_at(step)
        sgd.step()
    state = training.full_state()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_more_ranks_than_filters_is_refused_on_every_rank(world):
    if world.size == 1:
        pytest.skip("one rank can always hold everything")
    narrow = Architecture("narrow", (1, 2), (2, world.size - 1), False, 1, "cifar", 1, 10)
    with pytest.raises(LoftError, match=rf"{world.size} ranks cannot share the {world.size - 1} filters of layer2.1"):
        make_loft(world, narrow)


def test_as_many_ranks_as_filters_works(world):
    narrow = Architecture("narrow", (1, 2), (4, world.size), False, 1, "cifar", 1, 10)
    training = make_loft(world, narrow)
    training.advance()
    groups = partitioned_groups(filter_groups(narrow), "paper")
    assert len(training._sub.network.layer2[1].conv1.weight) == (1 if groups[0].width == world.size else None)
