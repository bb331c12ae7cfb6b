"""Intervals, the rules that end a pretraining, recipes: what needs no ranks."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from loft_hpc.analysis.distance import expected_distance
from loft_hpc.cli.main import run
from loft_hpc.cli.presets import FOLDER, NAMES, read_preset
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.emergence import Emergence, Stopping
from loft_hpc.filterwise.loft import LoftSettings, averages
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.jobs.retrain import RetrainSettings
from loft_hpc.jobs.settings import from_json
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.scores import by_group
from loft_hpc.runs.run import Run
from loft_hpc.training.interval import Interval, next_multiple, passes
from loft_hpc.training.settings import Snapshots


@pytest.mark.parametrize(
    ("text", "steps"), [("1ep", 11), ("3ep", 33), ("200it", 200), ("2", 22), (2, 22), ("0", 0), ("0it", 0)]
)  # fmt: skip
def test_intervals(text, steps):
    assert Interval.parse(text, "--snapshot-every").steps(11) == steps


@pytest.mark.parametrize("text", ["", "ep", "-1ep", "1.5ep", "1 ep", "1epoch", "0x1", "1ep2it", None])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(LoftError, match="--snapshot-every"):
        Snapshots(snapshot_every=text)


def test_passing_and_next_multiple():
    assert [end for end in range(1, 13) if passes(end - 1, end, 4)] == [4, 8, 12]
    assert passes(3, 9, 4) and not passes(4, 7, 4) and not passes(0, 100, 0)
    assert [next_multiple(step, 4) for step in (0, 3, 4, 5)] == [4, 4, 8, 8]


def test_shared_parameters_are_averaged_wherever_the_network_is_looked_at():
    settings = LoftSettings(average_every=5)
    ends = [0, 4, 8, 12, 16, 20, 24, 28, 32]
    averaged = [
        end for number, (begin, end) in enumerate(pairwise(ends), start=1) if averages(settings, number, begin, end, (15, 11), 32)
    ]  # fmt: skip
    # 12: a snapshot after 11; 16: an epoch after 15; 20: the fifth round; 24: 22; 32: 30, and the end
    assert averaged == [12, 16, 20, 24, 32]


def scores(*filters: float, scale=None) -> dict[str, torch.Tensor]:
    """One group, with norms and scales as given."""
    norms = torch.tensor(filters)
    return {"l2/a": norms, "l1/a": norms.clone(), "bn-scale/a": norms.clone() if scale is None else torch.tensor(scale)}


def swapped(size: int, *pairs: tuple[int, int]) -> dict[str, torch.Tensor]:
    values = list(range(size, 0, -1))
    for one, other in pairs:
        values[one], values[other] = values[other], values[one]
    return scores(*map(float, values))


def test_patience_counts_successive_snapshots():
    initial, moved, again = swapped(10, (2, 3)), swapped(10), swapped(10, (0, 1))
    emergence = Emergence(Stopping(stop_when_stable=True, tolerance=0.0, patience=2, stable_ratio=0.5))
    seen = [emergence.see(snapshot) for snapshot in (initial, moved, moved, again, again, again, again)]
    assert seen[0].fields == {} and seen[0].distance is None
    assert [observation.stop for observation in seen] == [False, False, False, False, False, True, True]
    assert seen[3].distance == pytest.approx(1.5 * np.log(2) / expected_distance(10))


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 1.0])
def test_a_network_that_stays_at_its_initial_ranking_is_never_stable(tolerance):
    """Nothing learnt does not move either. A snapshot counts from where its ranking has left the initial one."""
    emergence = Emergence(Stopping(stop_when_stable=True, tolerance=tolerance, patience=2, stable_ratio=0.5))
    seen = [emergence.see(snapshot) for snapshot in [swapped(10)] * 6 + [scores(*range(10))] * 3]
    assert [observation.stop for observation in seen] == [False] * 8 + [True]
    assert seen[5].fields["top_distance_to_initial"] == 0
    assert seen[8].fields["top_distance_to_initial"] > 1


def test_only_the_filters_of_the_ticket_in_view_must_stand_still():
    emergence = Emergence(Stopping(stop_when_stable=True, tolerance=0.0, patience=1, stable_ratio=0.8))
    snapshots = (swapped(10, (0, 9)), swapped(10), swapped(10, (8, 9)), swapped(10, (1, 2)))
    first, second, bottom, top = (emergence.see(snapshot) for snapshot in snapshots)
    assert not first.stop and not second.stop and bottom.stop and not top.stop
    assert bottom.fields["top_distance_to_previous"] == 0 < bottom.fields["distance_to_previous"]


def test_without_the_wish_to_stop_it_only_says_so():
    emergence = Emergence(Stopping(tolerance=0.0, patience=1))
    emergence.see(swapped(10, (0, 1)))
    emergence.see(swapped(10))
    seen = emergence.see(swapped(10))
    assert seen.fields["stable"] and not seen.stop


def test_early_birds_rule_looks_at_the_last_masks_together():
    """One filter of ten leaves the mask a snapshot, another enters: two entries of ten differ, then four from the mask before that."""
    masks = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]
    drifting = [[0, 1, 2, 3, 4], [5, 1, 2, 3, 4], [5, 6, 2, 3, 4], [5, 6, 7, 3, 4]]

    def stops(kept: list[list[int]], tolerance: float, patience: int) -> list[bool]:
        emergence = Emergence(
            Stopping(stop_when_stable=True, stability="mask-distance", tolerance=tolerance, patience=patience, stable_ratio=0.5)
        )
        snapshots = [scores(*range(10), scale=[2.0 if filter in mask else 1.0 for filter in range(10)]) for mask in kept]
        return [emergence.see(snapshot).stop for snapshot in snapshots]

    assert stops(masks, 0.0, 2) == [False, False, False, False, True, True]
    assert stops(masks, 0.2, 4) == [False, False, False, False, True, True]  # not before five masks are known
    assert stops(drifting, 0.2, 1) == [False, True, True, True]
    assert stops(drifting, 0.2, 2) == [False, False, False, False]  # each step is small, two together are not


def test_what_was_seen_before_an_interruption_counts():
    snapshots = [swapped(10, (0, 1)), swapped(10), swapped(10), swapped(10)]
    settings = Stopping(stop_when_stable=True, tolerance=0.0, patience=2)
    whole, resumed = Emergence(settings), Emergence(settings, snapshots[:3])
    assert [whole.see(snapshot).stop for snapshot in snapshots] == [False, False, False, True]
    assert resumed.see(snapshots[3]).stop


@pytest.mark.parametrize(
    "wrong", [{"tolerance": -0.1}, {"tolerance": 1.5}, {"patience": 0}, {"stable_ratio": 1.0}, {"stable_ratio": 0.0}, {"stability": "loss"}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(LoftError):
        Stopping(**wrong)


def test_scores_after_a_checkpoint_are_forgotten(tmp_path):
    run_ = Run(tmp_path, {})
    for step in (0, 10, 20):
        run_.snapshots.write_scores(step, swapped(4))
    run_.forget_after(10)
    assert run_.snapshots.score_steps() == [0, 10]


@pytest.mark.parametrize("name", NAMES)
def test_presets_name_options_that_exist_and_a_source_for_every_value(name, capsys):
    for command in read_preset(name):
        assert command in ("pretrain", "prune", "retrain")
    lines = [line for line in (FOLDER / f"{name}.toml").read_text().splitlines() if "=" in line and not line.startswith("#")]
    assert all(re.search(r"  # \[[PRDC]\]", line) for line in lines)
    # a mistake in a value or a name would end the command before it looks for the data
    assert run(["pretrain", "--preset", name, "--epochs", "0"]) == 2
    assert "--epochs" in capsys.readouterr().err
    assert run(["prune", "nowhere", "--preset", name]) == 1
    assert run(["retrain", "nowhere", "--preset", name, "--epochs", "0"]) == 2
    assert run(["sweep", "nowhere", "--preset", name]) == 1
    assert "nowhere is no run" in capsys.readouterr().err


def test_what_is_typed_overrides_a_preset(tmp_path):
    assert (
        run(
            ["pretrain", "--preset", "digits", "--widen", "1", "--epochs", "1", "--statistics-batches", "1", "--run", str(tmp_path / "run")]
        )
        == 0
    )
    configuration = Run.open(tmp_path / "run").configuration
    assert (configuration["model"], configuration["widen"], configuration["optimisation"]["lr"]) == ("resnet20", 1.0, 0.1)


def test_scores_read_back_stand_in_forward_order(tmp_path):
    """Files keep names in another order, in which block 10 comes before block 2; masks over all blocks must not depend on it."""
    draw = torch.Generator().manual_seed(0)
    snapshots = [
        {f"{criterion}/layer1.{block}": torch.rand(5, generator=draw) for criterion in ("l2", "l1", "bn-scale") for block in range(12)}
    ]
    snapshots.append({name: tensor.clone() for name, tensor in snapshots[0].items()})
    network = Architecture("many", (12,), (5,), False, 1, "cifar", 1, 10)
    run_ = Run(tmp_path, {"architecture": network.to_json()})
    run_.snapshots.write_scores(0, snapshots[0])
    back = run_.snapshots.read_scores(0)
    assert list(by_group(back, "l2")) == [f"layer1.{block}" for block in range(12)]
    emergence = Emergence(Stopping(), [back])
    seen = emergence.see(snapshots[1])
    assert seen.fields["mask_distance_to_previous"] == 0 == seen.distance


def test_settings_of_earlier_versions_keep_their_snapshots():
    assert from_json(PretrainSettings, {"snapshot_every": 0}).snapshots.snapshot_every == "0"
    assert from_json(PretrainSettings, {}).snapshots.snapshot_every == "1ep"
    assert from_json(RetrainSettings, {"snapshot_every": 3}).snapshots.every == Interval(3, "ep")


def test_names_of_snapshots_and_their_steps(tmp_path):
    """Epochs of 10 steps, rounds of 4, 25 steps in all: snapshots after 12, 20 and 25."""
    description = {"steps_per_epoch": 10, "total_steps": 25, "configuration": {"snapshots": {"snapshot_every": "1ep"}}}
    run_ = Run(tmp_path, description)
    for step in (0, 12, 20, 25):
        run_.snapshots.write_scores(step, swapped(4))
        run_.snapshots.write(run_.snapshots.name(step), swapped(4))
    assert run_.snapshots.names() == ["epoch-000", "epoch-001", "epoch-002", "epoch-003"]
    assert [run_.snapshots.step(name) for name in run_.snapshots.names()] == [0, 12, 20, 25]
    description["configuration"]["snapshots"]["snapshot_every"] = "12it"
    assert [run_.snapshots.name(step) for step in (0, 12, 24, 25)] == ["epoch-000", "step-000012", "step-000024", "epoch-003"]
