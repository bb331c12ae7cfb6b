"""The theorem's model: against autograd, against its infinite kernel, and against itself."""

import math

import numpy as np
import pytest
import torch

from loft_hpc import seeds
from loft_hpc.analysis.theory import Cell, Descent, Slope, _Trajectory, cut_into_patches, fit_slopes, left_hand_side
from loft_hpc.jobs.theory import TheorySettings, _problem, judge_slopes

SMALL = TheorySettings(images=6)


@pytest.fixture(scope="module")
def problem():
    return _problem(SMALL)


def output(problem, weights, signs, own=None):
    """f_s of the docstring, read aloud; own: the worker's filters."""
    total = torch.zeros(len(problem.labels), dtype=torch.float64)
    for r in range(len(weights)) if own is None else own:
        for j in range(problem.patches.shape[1]):
            total = total + signs[j, r] * torch.relu(problem.patches[:, j] @ weights[r])
    return total / math.sqrt(len(weights))


def loss(outputs, labels):
    return 0.5 * (outputs - labels).square().sum()


def test_images_have_norm_1_and_labels_a_sign(problem):
    assert problem.patches.shape == (6, 4, 16)
    torch.testing.assert_close(problem.patches.flatten(1).norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert set(problem.labels.tolist()) == {-1.0, 1.0}


def test_patches_hold_the_pixels_of_their_corner():
    images = torch.arange(1, 33).float().view(2, 1, 4, 4)
    cut = cut_into_patches(images, torch.ones(2), 2)
    corner = images[1, 0, 2:, :2].flatten().double()
    torch.testing.assert_close(cut.patches[1, 2], corner / images[1].double().norm())


def test_gradient_descent_against_autograd(problem):
    for workers in (1, 3):
        training = _Trajectory(problem, Descent(eta=0.3, steps=1), 7, workers, 0, 0)
        weights, signs = training.weights.clone().requires_grad_(), training._signs
        outputs = output(problem, weights, signs) / workers
        loss(outputs, problem.labels).backward()
        torch.testing.assert_close(training.step(None), outputs.detach())
        torch.testing.assert_close(training.weights, weights.detach() - 0.3 * weights.grad)


def test_loft_against_autograd(problem):
    """Every worker's own loss, the mean of the workers' steps."""
    training = _Trajectory(problem, Descent(eta=0.3, steps=1), 7, 3, 0, 0)
    start, signs = training.weights.clone(), training._signs
    holder = torch.tensor([0, 2, 1, 1, 0, 2, 0])
    expected = start.clone()
    for worker in range(3):
        weights = start.clone().requires_grad_()
        loss(output(problem, weights, signs, (holder == worker).nonzero().flatten().tolist()), problem.labels).backward()
        expected -= 0.3 * weights.grad / 3
    training.step(holder)
    torch.testing.assert_close(training.weights, expected)


def test_the_network_is_the_mean_of_its_workers(problem):
    training = _Trajectory(problem, Descent(eta=0.1, steps=1), 8, 4, 0, 0)
    parts = [output(problem, training.weights, training._signs, [2 * worker, 2 * worker + 1]) for worker in range(4)]
    torch.testing.assert_close(training.step(None), sum(parts) / 4)


def test_the_kernel_is_that_of_many_filters(problem):
    """<df/dW(x_i), df/dW(x_k)> at an initialisation of many filters."""
    filters, places = 20_000, problem.patches.shape[1]
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(filters, 16, generator=draw, dtype=torch.float64)
    signs = torch.randint(0, 2, (places, filters), generator=draw).double() * 2 - 1
    active = (torch.einsum("ijq,rq->ijr", problem.patches, weights) > 0).double() * signs
    gradients = torch.einsum("ijr,ijq->irq", active, problem.patches) / math.sqrt(filters)
    empirical = torch.einsum("irq,krq->ik", gradients, gradients)
    torch.testing.assert_close(problem.kernel, empirical, atol=0.02, rtol=0)
    lowest, highest = problem.eigenvalues
    assert 0 < lowest < highest


def test_one_worker_is_gradient_descent_to_the_last_bit(problem):
    (cell,) = left_hand_side(problem, Descent(eta=0.5, steps=20), 16, (1,), 0, 3, 0)
    assert (cell.weights, cell.outputs, cell.spread, cell.drift) == (0, 0, 0, 0)


def test_two_workers_move_away_and_the_same_each_time(problem):
    first = left_hand_side(problem, Descent(eta=0.5, steps=20), 16, (2, 4), 1, 3, 0)
    again = left_hand_side(problem, Descent(eta=0.5, steps=20), 16, (2, 4), 1, 3, 0)
    assert first == again and all(cell.weights > 0 and cell.outputs > 0 and cell.spread > 0 for cell in first)
    other = left_hand_side(problem, Descent(eta=0.5, steps=20), 16, (2,), 1, 3, 1)[0]
    assert other.weights != first[0].weights


def test_spread_and_drift_by_hand(problem):
    """The mean squared distance is the unbiased spread plus the drift that is left."""
    descent, ends = Descent(eta=0.5, steps=5), []
    (cell,) = left_hand_side(problem, descent, 8, (2,), 0, 3, 0)
    plain = _Trajectory(problem, descent, 8, 2, 0, 0)
    for _ in range(5):
        plain.step(None)
    for deal in range(3):
        training = _Trajectory(problem, descent, 8, 2, 0, 0)
        draw = seeds.generator(0, "theory", 8, 0, 2, deal)
        for _ in range(5):
            training.step((torch.arange(8) % 2)[torch.randperm(8, generator=draw)])
        ends.append((training.weights - plain.weights).numpy())
    mean = np.mean(ends, axis=0)
    spread = sum(((end - mean) ** 2).sum() for end in ends) / 2
    assert cell.spread == pytest.approx(spread)
    assert cell.drift == pytest.approx((mean**2).sum() - spread / 3)
    assert cell.weights == pytest.approx(np.mean([(end**2).sum() for end in ends]))


def test_slopes_are_those_of_a_power_law():
    cells = [Cell(m, 2, start, (1 + start) * m**-0.5, m**-1.0, 0.25 * m**-0.5) for m in (16, 64, 256) for start in range(3)]
    found = {slope.term: slope for slope in fit_slopes(cells)}
    assert found["weights"].exponent == pytest.approx(-0.5) and found["outputs"].exponent == pytest.approx(-1)
    assert found["weights"].half_width == pytest.approx(0, abs=1e-9)


def test_a_term_that_is_not_positive_everywhere_has_no_slope():
    cells = [Cell(m, 2, start, 1.0, 1.0, 1.5 if (m, start) == (64, 1) else 0.5) for m in (16, 64) for start in range(3)]
    assert {slope.term for slope in fit_slopes(cells)} == {"weights", "spread", "outputs", "total"}


def test_one_initialisation_has_no_interval_and_no_verdict():
    cells = [Cell(m, 2, 0, 1 / m, 1 / m, 0.5 / m) for m in (16, 64)]
    slopes = fit_slopes(cells)
    assert slopes and all(math.isnan(slope.half_width) for slope in slopes)
    assert judge_slopes(slopes) == ""


@pytest.mark.parametrize(
    ("exponent", "half_width", "verdict"),
    [
        (-0.5, 0.2, "falls with m, faster than m^(-1/4)"),
        (-0.3, 0.1, "falls with m for"),
        (-0.2, 0.3, "does not change with m as far as this can tell"),
        (0.3, 0.1, "GROWS with m"),
    ],
)
def test_verdicts_on_exponents(exponent, half_width, verdict):
    assert verdict in judge_slopes([Slope(2, "spread", exponent, half_width)])


def test_every_number_of_workers_is_judged_by_itself():
    said = judge_slopes([Slope(2, "spread", -1.6, 0.1), Slope(4, "spread", 2.1, 0.1)])
    assert "faster than m^(-1/4) for S = 2" in said and "GROWS with m for S = 4" in said
