"""The learning rate of every step, beside torch's own schedulers."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from loft_hpc.errors import LoftError
from loft_hpc.training.schedule import Schedule
from loft_hpc.training.settings import Optimisation


def rates_of_torch(lr: float, steps: int, make) -> list[float]:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = make(sgd), []
    for _ in range(steps):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("rule", ["cosine", "constant"])
def test_warm_up_then_the_schedule(rule, warmup):
    total = 40

    def make(sgd):
        cosine = lr_scheduler.CosineAnnealingLR(sgd, T_max=total - warmup)
        after = cosine if rule == "cosine" else lr_scheduler.ConstantLR(sgd, factor=1.0)
        if not warmup:
            return after
        # the last of the rising steps has the full rate already, as has the first of what follows
        rising = lr_scheduler.LinearLR(sgd, start_factor=1 / warmup, total_iters=max(1, warmup - 1))
        return lr_scheduler.SequentialLR(sgd, [rising, after], milestones=[warmup])

    schedule = Schedule(Optimisation(lr=0.3, schedule=rule, warmup=f"{warmup}it"), total, 10)
    assert [schedule.lr_at(step) for step in range(total)] == pytest.approx(rates_of_torch(0.3, total, make))


def test_an_extended_cosine_is_warm_restarts():
    """SGDR (Loshchilov and Hutter 2017) with periods of one length is torch's CosineAnnealingWarmRestarts."""
    schedule = Schedule(Optimisation(lr=0.1, schedule="cosine", restarts=(2, 4)), 60, 10)
    theirs = rates_of_torch(0.1, 60, lambda sgd: lr_scheduler.CosineAnnealingWarmRestarts(sgd, T_0=20))
    assert [schedule.lr_at(step) for step in range(60)] == pytest.approx(theirs)


def test_an_extension_changes_no_step_before_it():
    for rule in ("cosine", "step", "constant"):
        before = Schedule(Optimisation(lr=0.1, schedule=rule), 30, 10)
        after = Schedule(Optimisation(lr=0.1, schedule=rule, restarts=(3,)), 50, 10)
        assert [after.lr_at(step) for step in range(30)] == [before.lr_at(step) for step in range(30)]
        assert after.lr_at(30) == 0.1


def test_milestones_are_fractions_of_the_whole_training():
    schedule = Schedule(Optimisation(lr=1.0, schedule="step", warmup="2ep"), 100, 10)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[19:] == pytest.approx([1.0] * 31 + [0.1] * 25 + [0.01] * 25) and rates[:20] == [(step + 1) / 20 for step in range(20)]


def test_training_in_the_middle_of_a_schedule():
    whole, late = (Schedule(Optimisation(warmup="1ep"), steps, 10, skipped) for steps, skipped in ((50, 0), (35, 15)))
    assert [late.lr_at(step) for step in range(35)] == [whole.lr_at(step + 15) for step in range(35)]


@pytest.mark.parametrize(("warmup", "restarts"), [("5ep", ()), ("50it", ()), ("6ep", ()), ("3ep", (3,))])
def test_a_warm_up_as_long_as_the_schedule_is_refused(warmup, restarts):
    with pytest.raises(LoftError, match="shorten the warm-up") as problem:
        Schedule(Optimisation(warmup=warmup, restarts=restarts), 50, 10)
    assert problem.value.usage
    assert math.isfinite(Schedule(Optimisation(warmup="29it", restarts=(3,)), 50, 10).lr_at(49))
