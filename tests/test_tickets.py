"""Tickets: exact counts, the right filters, and a smaller network that does the same."""

import json

import numpy as np
import pytest
import torch

from loft_hpc.errors import LoftError
from loft_hpc.files import write_tensors
from loft_hpc.jobs.source import prunable_groups
from loft_hpc.models.groups import filter_groups, mask_state
from loft_hpc.models.resnet import build
from loft_hpc.models.scores import removed_count
from loft_hpc.tickets.finders.magnitude import MagnitudeOptions, largest_filters
from loft_hpc.tickets.finders.random import random_filters
from loft_hpc.tickets.masks import FilterMask
from loft_hpc.tickets.pruning import Pruning
from loft_hpc.tickets.ticket import Ticket

from tiny import tiny


def find(state, groups, ratio, **options):
    return largest_filters(state, groups, ratio, MagnitudeOptions(**options))


@pytest.fixture
def state():
    return build(tiny(), seed=1).state_dict()


@pytest.mark.parametrize(
    ("filters", "ratio", "removed"), [(64, 0.8, 51), (64, 0.5, 32), (64, 0.3, 19), (100, 0.29, 29), (10, 0.7, 7), (2, 0.99, 1), (1, 0.9, 0)]
)
def test_removed_counts(filters, ratio, removed):
    assert removed_count(filters, ratio) == removed


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitude_keeps_the_largest(state, criterion):
    """The release keeps the smallest (facts/loft.md): no filter that goes may be larger than one that stays."""
    groups = filter_groups(tiny())
    kept = find(state, groups, ratio=0.4, criterion=criterion)
    for group in groups:
        norms = torch.linalg.vector_norm(state[group.filters].flatten(1), 1 if criterion == "l1" else 2, dim=1)
        gone = np.setdiff1d(np.arange(group.width), kept[group.name])
        assert len(gone) == removed_count(group.width, 0.4)
        assert norms[kept[group.name]].min() > norms[gone].max()
        assert kept[group.name].tolist() == sorted(kept[group.name].tolist())


def test_each_group_is_ranked_by_its_own_filters(state):
    """The release prunes stages 3 and 4 with stage 2's mask (facts/loft.md)."""
    groups = filter_groups(tiny())
    for group in groups:
        state[group.filters] = torch.ones_like(state[group.filters])
        state[group.filters][group.stage :: 2] = 2
    kept = find(state, groups, ratio=0.5)
    for group in groups:
        expected = list(range(group.width))[group.stage :: 2]
        assert set(expected) <= set(kept[group.name].tolist())


def test_global_scope_removes_an_exact_count_and_respects_the_floor(state):
    groups = filter_groups(tiny())
    state["layer2.0.conv1.weight"] *= 1e-3  # by norm alone this group would vanish
    total = sum(group.width for group in groups)
    for ratio, floor in ((0.3, 0.0), (0.5, 0.25), (0.7, 0.25)):
        kept = find(state, groups, ratio=ratio, scope="global", floor=floor)
        assert total - sum(map(len, kept.values())) == removed_count(total, ratio)
        assert len(kept["layer2.0"]) == max(1, int(12 * floor))
    with pytest.raises(LoftError, match="--floor"):
        find(state, groups, ratio=0.9, scope="global", floor=0.5)


def test_global_scores_do_not_depend_on_the_size_of_a_filter(state):
    groups = filter_groups(tiny())
    for group in groups:
        state[group.filters] = torch.ones_like(state[group.filters])
    state["layer3.1.conv1.weight"][5] = 1.1
    for criterion in ("l1", "l2"):
        kept = find(state, groups, ratio=0.5, scope="global", criterion=criterion)
        assert 5 in kept["layer3.1"]


def test_random_tickets_have_the_sizes_of_magnitude_and_follow_their_seed(state):
    groups = filter_groups(tiny())
    first, again, other = (random_filters(groups, 0.5, seed) for seed in (1, 1, 2))
    magnitude = find(state, groups, ratio=0.5)
    assert all(len(first[name]) == len(magnitude[name]) for name in magnitude)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_releases_choice_of_blocks():
    names = [group.name for group in prunable_groups(filter_groups(tiny()), "release")]
    assert names == ["layer2.1", "layer3.1"]


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": -1},
        {"ratio": float("nan")},
        {"method": "luck"},
        {"criterion": "l3"},
        {"scope": "here"},
        {"floor": 1.0},
    ],
)
def test_wrong_pruning_is_refused(fields):
    with pytest.raises(LoftError):
        Pruning.of(**{"ratio": 0.5} | fields)


def make_ticket(path, state) -> Ticket:
    groups = filter_groups(tiny())
    mask = FilterMask(tiny(), find(state, groups, ratio=0.5))
    return Ticket(path, mask, mask.carve(state), {"method": "magnitude", "ratio": 0.5, "data": {}, "evaluation": {}})


def test_ticket_survives_and_equals_the_masked_network(tmp_path, state):
    make_ticket(tmp_path / "half", state).write()
    ticket = Ticket.read(tmp_path / "half")
    slim, masked = build(tiny(), ticket.hidden_widths), build(tiny())
    slim.load_state_dict(ticket.state)
    masked.load_state_dict(mask_state(state, ticket.selection, filter_groups(tiny())))
    x = torch.randn(16, 1, 8, 8)
    torch.testing.assert_close(slim.eval()(x), masked.eval()(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in slim.parameters()) < 0.6 * sum(p.numel() for p in masked.parameters())
    assert ticket.provenance["ratio"] == 0.5
    rewound = ticket.carve(build(tiny(), seed=9).state_dict())
    assert rewound.keys() == ticket.state.keys()
    assert all(rewound[name].shape == ticket.state[name].shape for name in rewound)


def test_ticket_is_never_overwritten(tmp_path, state):
    make_ticket(tmp_path / "half", state).write()
    with pytest.raises(LoftError, match="never overwritten"):
        make_ticket(tmp_path / "half", state).write()


def test_tampered_tickets_are_one_line(tmp_path, state):
    make_ticket(tmp_path / "half", state).write()
    folder = tmp_path / "half"
    originals = {file: file.read_bytes() for file in folder.iterdir()}
    description = json.loads(originals[folder / "ticket.json"])

    def wrong_widths():
        description["hidden_widths"]["layer1.0"] += 1
        (folder / "ticket.json").write_text(json.dumps(description))

    def wrong_mask():
        masks = {group.name: torch.full((group.width,), 2, dtype=torch.uint8) for group in filter_groups(tiny())}
        write_tensors(folder / "mask.safetensors", masks)

    def torn_model():
        (folder / "model.safetensors").write_bytes(originals[folder / "model.safetensors"][:50])

    def no_architecture():
        (folder / "ticket.json").write_text("{}")

    def no_mask():
        (folder / "mask.safetensors").unlink()

    for damage in (wrong_widths, wrong_mask, torn_model, no_architecture, no_mask):
        damage()
        with pytest.raises(LoftError) as told:
            Ticket.read(folder)
        assert "\n" not in str(told.value), damage
        for file, content in originals.items():
            file.write_bytes(content)
    Ticket.read(folder)
