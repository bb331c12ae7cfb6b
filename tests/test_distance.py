"""The filter distance, against a plain implementation of the poster's formula and against examples by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from loft_hpc.analysis.distance import expected_distance, filter_distance, filter_norms, network_distance, ranks
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import filter_groups

from tiny import initial_state, tiny


def plain(first, second):
    """F(sigma) = sum_i 1/i |ln i - ln sigma(i)|, read aloud from the poster."""
    total = 0.0
    for position in range(1, len(first) + 1):
        filter_at_position = list(first).index(position)
        total += abs(math.log(position) - math.log(second[filter_at_position])) / position
    return total


def test_equals_a_plain_implementation():
    draw = np.random.default_rng(0)
    for count in (1, 2, 3, 17, 64):
        for _ in range(20):
            first, second = draw.permutation(count) + 1, draw.permutation(count) + 1
            assert filter_distance(first, second) == pytest.approx(plain(first, second), rel=1e-12)


def test_by_hand():
    identity = np.array([1, 2, 3])
    assert filter_distance(identity, identity) == 0
    swapped_top = np.array([2, 1, 3])  # 1/1 ln 2 + 1/2 ln 2
    assert filter_distance(identity, swapped_top) == pytest.approx(1.5 * math.log(2))
    swapped_bottom = np.array([1, 3, 2])  # 1/2 ln(3/2) + 1/3 ln(3/2)
    assert filter_distance(identity, swapped_bottom) == pytest.approx(5 / 6 * math.log(1.5))


def test_zero_only_for_equal_rankings_and_not_symmetric():
    asymmetric = 0
    for one in itertools.permutations(range(1, 5)):
        for other in itertools.permutations(range(1, 5)):
            forth, back = filter_distance(np.array(one), np.array(other)), filter_distance(np.array(other), np.array(one))
            assert (forth == 0) == (one == other)
            asymmetric += not math.isclose(forth, back)
    assert asymmetric > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_expectation_over_all_permutations(count):
    identity = np.arange(1, count + 1)
    values = [filter_distance(identity, np.array(sigma)) for sigma in itertools.permutations(range(1, count + 1))]
    assert expected_distance(count) == pytest.approx(np.mean(values))


def test_ranks_put_the_largest_first_and_ties_in_order():
    assert ranks(np.array([0.5, 2.0, 0.5, 3.0])).tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_over_a_whole_filter(norm, order):
    weight = torch.randn(5, 3, 3, 3)
    expected = [torch.linalg.vector_norm(one.double(), order).item() for one in weight]
    np.testing.assert_allclose(filter_norms(weight, norm), expected, rtol=1e-12)


def test_relabelling_filters_in_both_networks_changes_nothing():
    groups = filter_groups(tiny())
    first, second = initial_state(tiny(), 0), initial_state(tiny(), 1)
    before = network_distance(first, second, groups)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for state in (first, second):
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][shuffle]
    assert network_distance(first, second, groups) == before
    assert before[0].normalised == pytest.approx(before[0].distance / expected_distance(8))


def test_networks_of_other_shapes_are_refused():
    state = initial_state(tiny())
    with pytest.raises(LoftError, match=r"layer1\.0"):
        network_distance(state, {name: tensor[:4] for name, tensor in state.items()}, filter_groups(tiny()))
