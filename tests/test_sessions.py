"""What a session is put together from: when things fall due, and how rounds are logged."""

import json
import random

import pytest

from loft_hpc.runs.run import Run
from loft_hpc.training import roundlog
from loft_hpc.training.calendar import Calendar
from loft_hpc.training.roundlog import RoundLog
from loft_hpc.training.strategy import Advance
from loft_hpc.training.stretch import Stretch

from tiny import tiny


@pytest.mark.parametrize("seed", range(20))
def test_nothing_falls_due_twice_or_never(seed):
    """However long the stretches between two looks are, as long as none is longer than an interval."""
    draw = random.Random(seed)
    calendar = Calendar(draw.randrange(50, 200), 11, 22, draw.choice((0, 7)), draw.choice((0, 5, 13)))
    due, step = [], 0
    while step < calendar.total_steps:
        end = min(step + draw.randrange(1, 6), calendar.total_steps)
        due.append(calendar.due(step, end))
        step = end
    everything = [("epoch", 11), ("evaluation", 22), ("snapshot", calendar.snapshot_steps), ("checkpoint", calendar.checkpoint_steps)]
    for name, every in everything:
        inside = (calendar.total_steps - 1) // every if every else 0
        times = sum(getattr(each, name) for each in due)
        assert times in (inside, inside + 1) and getattr(due[-1], name), name


def test_the_next_date_is_the_first_one():
    calendar = Calendar(60, 11, 22, 7, 0)
    for step in range(60):
        following = calendar.next(step)
        assert following > step
        due = [calendar.due(step, end) for end in range(step + 1, following + 1)]
        assert any((due[-1].epoch, due[-1].snapshot, due[-1].checkpoint)) and not any(each.epoch or each.snapshot for each in due[:-1])


def rounds(count: int, first: int = 1) -> list[Advance]:
    return [Advance(8 * number, 1 / number, 0.5, number) for number in range(first, first + count)]


def test_a_log_of_100_000_rounds_stays_readable_and_loses_nothing(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", {}, {"architecture": tiny().to_json()})
    log = RoundLog(run.log, 100_000)
    for done in rounds(100_000):
        log.add(done)
    lines = run.events("round")
    assert len(lines) == roundlog.LINES
    assert [line["round"] for line in lines] == list(range(20, 100_001, 20)) and all(line["rounds"] == 20 for line in lines)
    assert sum(line["loss"] * line["rounds"] for line in lines) == pytest.approx(sum(1 / number for number in range(1, 100_001)))
    assert sum(line["exchange_seconds"] for line in lines) == 50_000
    assert (lines[0]["lowest_loss"], lines[0]["highest_loss"]) == (1 / 20, 1)


def test_rounds_are_written_out_before_a_checkpoint_and_each_of_a_short_training(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", {}, {"architecture": tiny().to_json()})
    long = RoundLog(run.log, 50_000)
    for done in rounds(13):
        long.add(done)
    long.flush()
    long.flush()
    for done in rounds(7, first=14):
        long.add(done)
    assert [(line["round"], line["rounds"]) for line in run.events("round")] == [(10, 10), (13, 3), (20, 7)]
    short = RoundLog(run.log, 100)
    short.add(rounds(1)[0])
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"event": "round", "round": 1, "step": 8, "loss": 1.0, "exchange_seconds": 0.5}


def test_an_epoch_begun_before_a_checkpoint_is_ended_after_it():
    stretch = Stretch(11)
    stretch.add(Advance(15, 2.0, 0.25), 4, 1.5)
    fields = json.loads(json.dumps(stretch.to_json([8.0, 6.0])))
    own, other = Stretch.from_json(fields, 15, 0, 2), Stretch.from_json(fields, 15, 2, 3)
    assert (own.first_step, own.steps, own.losses, own.seconds, own.exchange_seconds) == (11, 4, 8.0, 1.5, 0.25)
    assert own.mean_loss == 2.0 and other.mean_loss == 7 / 4  # another number of ranks: the mean of what there was
