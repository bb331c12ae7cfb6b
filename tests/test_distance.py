"""The filter distance, against a plain implementation of the poster's formula and against examples by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from loft_hpc.analysis.distance import (
    expected_distance,
    filter_distance,
    global_mask,
    mask_distance,
    network_distance,
    ranks,
    score_distance,
)
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.scores import by_group, filter_norms, filter_scores

from tiny import initial_state, tiny


def plain(first, second, top=None):
    """F(sigma) = sum_i 1/i |ln i - ln sigma(i)|, read aloud from the poster; over the `top` filters of the first ranking."""
    total = 0.0
    for position in range(1, (top or len(first)) + 1):
        filter_at_position = list(first).index(position)
        total += abs(math.log(position) - math.log(second[filter_at_position])) / position
    return total


def test_equals_a_plain_implementation():
    draw = np.random.default_rng(0)
    for count in (1, 2, 3, 17, 64):
        for _ in range(20):
            first, second = draw.permutation(count) + 1, draw.permutation(count) + 1
            top = int(draw.integers(1, count + 1))
            assert filter_distance(first, second) == pytest.approx(plain(first, second), rel=1e-12)
            assert filter_distance(first, second, top) == pytest.approx(plain(first, second, top), rel=1e-12)


def test_by_hand():
    identity = np.array([1, 2, 3])
    assert filter_distance(identity, identity) == 0
    swapped_top = np.array([2, 1, 3])  # 1/1 ln 2 + 1/2 ln 2
    assert filter_distance(identity, swapped_top) == pytest.approx(1.5 * math.log(2))
    assert filter_distance(identity, swapped_top, top=1) == pytest.approx(math.log(2))
    swapped_bottom = np.array([1, 3, 2])  # 1/2 ln(3/2) + 1/3 ln(3/2)
    assert filter_distance(identity, swapped_bottom) == pytest.approx(5 / 6 * math.log(1.5))
    assert filter_distance(identity, swapped_bottom, top=1) == 0


def test_zero_only_for_equal_rankings_and_not_symmetric():
    asymmetric = 0
    for one in itertools.permutations(range(1, 5)):
        for other in itertools.permutations(range(1, 5)):
            forth, back = filter_distance(np.array(one), np.array(other)), filter_distance(np.array(other), np.array(one))
            assert (forth == 0) == (one == other)
            asymmetric += not math.isclose(forth, back)
    assert asymmetric > 0


def test_a_swap_costs_the_more_the_higher_it_stands():
    identity = np.arange(1, 33)
    costs = []
    for position in range(31):
        swapped = identity.copy()
        swapped[[position, position + 1]] = swapped[[position + 1, position]]
        costs.append(filter_distance(identity, swapped))
    assert costs == sorted(costs, reverse=True) and costs[0] > 100 * costs[-1]


def test_relabelling_both_rankings_alike_changes_nothing():
    draw = np.random.default_rng(1)
    for _ in range(20):
        first, second, labels = draw.permutation(40) + 1, draw.permutation(40) + 1, draw.permutation(40)
        assert filter_distance(first[labels], second[labels], 10) == pytest.approx(filter_distance(first, second, 10), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_expectation_over_all_permutations(count):
    identity = np.arange(1, count + 1)
    everything = [np.array(sigma) for sigma in itertools.permutations(range(1, count + 1))]
    for top in range(1, count + 1):
        values = [filter_distance(identity, sigma, top) for sigma in everything]
        assert expected_distance(count, top) == pytest.approx(np.mean(values), abs=1e-12)
    assert expected_distance(count) == expected_distance(count, count)


@pytest.mark.parametrize(("count", "top"), [(64, 64), (512, 102)])
def test_expectation_against_drawn_permutations(count, top):
    draw = np.random.default_rng(2)
    identity = np.arange(1, count + 1)
    values = [filter_distance(identity, draw.permutation(count) + 1, top) for _ in range(4000)]
    assert abs(np.mean(values) - expected_distance(count, top)) < 4 * np.std(values) / math.sqrt(len(values))


def test_ranks_put_the_largest_first_and_ties_in_order():
    assert ranks(np.array([0.5, 2.0, 0.5, 3.0])).tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_over_a_whole_filter(norm, order):
    weight = torch.randn(150, 3, 3, 3)
    expected = [torch.linalg.vector_norm(one.double(), order).float().item() for one in weight]
    np.testing.assert_allclose(filter_norms(weight, norm), expected, rtol=1e-7)


def test_filters_that_differ_in_the_order_of_their_weights_alone_tie():
    """Sums in another order differ in their last bits, as they do between machines: no ranking may depend on that."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(256, 9, 3, 3, generator=generator)
    shuffled = weights.reshape(256, -1)[:, torch.randperm(81, generator=generator)].reshape(256, 9, 3, 3)
    for norm in ("l1", "l2"):
        assert torch.equal(filter_norms(weights, norm), filter_norms(shuffled, norm))
        memory = shuffled.to(memory_format=torch.channels_last)
        assert torch.equal(filter_norms(memory, norm), filter_norms(weights, norm))


def test_relabelling_filters_in_both_networks_changes_nothing():
    groups = filter_groups(tiny())
    first, second = initial_state(tiny(), 0), initial_state(tiny(), 1)
    before = network_distance(first, second, groups)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for state in (first, second):
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][shuffle]
    after = network_distance(first, second, groups)
    assert [row.distance for row in after] == pytest.approx([row.distance for row in before])
    assert before[0].normalised == pytest.approx(before[0].distance / expected_distance(8))


def test_networks_of_other_shapes_are_refused():
    state = initial_state(tiny())
    with pytest.raises(LoftError, match=r"layer1\.0"):
        network_distance(state, {name: tensor[:4] for name, tensor in state.items()}, filter_groups(tiny()))
    with pytest.raises(LoftError, match=r"layer2\.1"):
        network_distance(state, {name: tensor for name, tensor in state.items() if "layer2.1" not in name}, filter_groups(tiny()))


@pytest.mark.parametrize("pre_activation", [False, True])
def test_scores_hold_norms_and_scales_of_every_group(pre_activation):
    network = tiny(pre_activation)
    groups, state = filter_groups(network), initial_state(network)
    norm = "bn2" if pre_activation else "bn1"
    state[f"layer2.1.{norm}.weight"][3] = -7.0
    scores = filter_scores(state, groups)
    assert set(scores) == {f"{criterion}/{group.name}" for group in groups for criterion in ("l1", "l2", "bn-scale")}
    assert scores["bn-scale/layer2.1"][3] == 7
    assert [len(values) for values in by_group(scores, "l2").values()] == [group.width for group in groups]
    # distances of scores are distances of networks
    other = filter_scores(initial_state(network, 1), groups)
    expected = network_distance(state, initial_state(network, 1), groups, "l1")
    assert score_distance(by_group(scores, "l1"), by_group(other, "l1")) == expected


def test_only_the_filters_that_a_ratio_leaves_count():
    first = {"a": np.array([4.0, 3.0, 2.0, 1.0])}
    bottom_swapped, top_swapped = {"a": np.array([4.0, 3.0, 1.0, 2.0])}, {"a": np.array([3.0, 4.0, 2.0, 1.0])}
    assert score_distance(first, bottom_swapped, 0.5)[0].normalised == 0 < score_distance(first, bottom_swapped)[0].normalised
    found = score_distance(first, top_swapped, 0.5)[0]
    assert found.distance == pytest.approx(1.5 * math.log(2))
    assert found.normalised == pytest.approx(1.5 * math.log(2) / expected_distance(4, 2))


def test_masks_by_one_threshold_over_the_network():
    scores = {"a": np.array([1.0, 5.0, 5.0]), "b": np.array([0.5, 5.0])}
    assert global_mask(scores, 0.4).tolist() == [False, True, True, False, True]
    assert global_mask(scores, 0.6).tolist() == [False, True, True, False, False]  # an exact number, ties in order
    assert mask_distance(global_mask(scores, 0.4), global_mask(scores, 0.6)) == pytest.approx(0.2)
