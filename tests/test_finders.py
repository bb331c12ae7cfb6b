"""Masks and finders: exact counts, the right units, the shapes that another library gives, and the numbers that papers print."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loft_hpc.analysis.size import network_size, ticket_size
from loft_hpc.errors import LoftError
from loft_hpc.jobs.check import random_like
from loft_hpc.jobs.prune import ticket_name
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.resnet import build
from loft_hpc.models.scores import filter_scores
from loft_hpc.runs.run import Run
from loft_hpc.tickets import finders  # noqa: F401 (they register themselves)
from loft_hpc.tickets.counts import kept_count, kept_of_all, kept_of_each, largest_of_all
from loft_hpc.tickets.finders.gem_miner import paper_regulariser, search_rate
from loft_hpc.tickets.finders.imp import level_counts
from loft_hpc.tickets.finders.magnitude import chosen_weights, largest_filters
from loft_hpc.tickets.finders.random import even_counts, random_filters, smart_ratios
from loft_hpc.tickets.masks import BlockMask, FilterMask, WeightMask, weight_shapes
from loft_hpc.tickets.pruning import FINDERS, Found, Pruning, option, register
from loft_hpc.tickets.score_search import freezings, score_gradient, signed_constants
from loft_hpc.tickets.ticket import Cost, Ticket

from tiny import tiny

RATIOS = (0.1, 0.5, 0.8, 0.95, 0.9856, 0.9941)
"""The last two: the densities of 1.44 % and 0.59 % of the Gem-Miner paper."""


def sizes_of(model: Architecture) -> dict[str, int]:
    return {name: shape.numel() for name, shape in weight_shapes(model).items()}


def weight_scores(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.abs() for name, tensor in build(tiny(), seed=seed).state_dict().items() if tensor.dim() > 1}


# -- counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_ranking_over_all_weights_keeps_an_exact_number(ratio):
    scores = weight_scores()
    total = sum(tensor.numel() for tensor in scores.values())
    kept = chosen_weights(scores, ratio, "global", 0.0)
    assert sum(int(mask.sum()) for mask in kept.values()) == total - int(ratio * total + 1e-9)
    threshold = min(scores[name][kept[name].bool()].min() for name in scores if kept[name].any())
    assert all((scores[name][~kept[name].bool()] <= threshold).all() for name in scores)


def test_ties_do_not_overshoot():
    kept = largest_of_all({"a": np.ones(50), "b": np.ones(51)}, 0.9, 0.0, 0, "weights")
    assert [len(indices) for indices in kept.values()] == [11, 0]  # 101 - 90, those that stand first


@pytest.mark.parametrize("ratio", RATIOS[:4])
def test_the_same_share_of_every_layer(ratio):
    kept = chosen_weights(weight_scores(), ratio, "layer", 0.0)
    for mask in kept.values():
        assert int(mask.sum()) == mask.numel() - int(ratio * mask.numel() + 1e-9)


def test_layers_of_one_filter_keep_it():
    assert kept_of_each({"a": 1, "b": 10}, 0.9, "filters") == {"a": 1, "b": 1}
    groups = filter_groups(Architecture("thin", (1, 1, 1), (1, 8, 8), False, 1, "cifar", 1, 10))
    state = build(Architecture("thin", (1, 1, 1), (1, 8, 8), False, 1, "cifar", 1, 10), seed=0).state_dict()
    assert {name: len(kept) for name, kept in largest_filters(state, groups, 0.75).items()} == {"layer1.0": 1, "layer2.0": 2, "layer3.0": 2}


def test_too_small_a_density_names_the_layer_and_what_is_possible():
    with pytest.raises(LoftError, match=r"layer1\.0.*would vanish.*smallest density possible is 0\.0625: give --ratio 0\.9375 or less"):
        kept_of_each({"layer1.0": 8, "layer2.0": 16}, 0.95, "filters")
    assert kept_of_each({"layer1.0": 8, "layer2.0": 16}, 0.9375, "filters")["layer1.0"] == 1
    with pytest.raises(LoftError, match=r"b.*would vanish.*0\.03"):
        kept_of_all({"a": 90, "b": 5, "c": 5}, 0.98, "weights")
    assert kept_of_all({"a": 90, "b": 5, "c": 5}, 0.97, "weights") == 3


@pytest.mark.parametrize(("model", "ratio"), list(itertools.product(("resnet20", "preresnet32", "resnet18"), RATIOS)))
def test_smart_ratios_sum_exactly_and_fall_with_depth(model, ratio):
    sizes = sizes_of(architecture(model, 10))
    keep = sum(sizes.values()) - int(ratio * sum(sizes.values()) + 1e-9)
    counts = smart_ratios(sizes, keep)
    assert sum(counts.values()) == keep
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)
    densities = [counts[name] / sizes[name] for name in sizes][:-1]
    assert all(later <= earlier + 1 / 16 for earlier, later in itertools.pairwise(densities))


@pytest.mark.parametrize("missing", [0, 1, 300, 3000])
def test_smart_ratios_of_nearly_all_weights(missing):
    sizes = sizes_of(architecture("resnet20", 10))
    counts = smart_ratios(sizes, sum(sizes.values()) - missing)
    assert sum(counts.values()) == sum(sizes.values()) - missing and all(counts[name] <= sizes[name] for name in sizes)


def test_even_counts_are_exact():
    sizes = {group.name: group.width for group in filter_groups(architecture("resnet20", 10))}
    for keep in (9, 10, 39, 72, 240, sum(sizes.values())):
        counts = even_counts(sizes, keep)
        assert sum(counts.values()) == keep and all(1 <= counts[name] <= sizes[name] for name in sizes)
    shares = [counts[name] / sizes[name] for counts in [even_counts(sizes, 72)] for name in sizes]
    assert max(shares) - min(shares) < 1 / 16


def test_a_shuffled_random_ticket_is_another_random_one():
    """One stream for both would shuffle seed 0's draw into the first filters of every block."""
    groups = filter_groups(tiny())
    mask = FilterMask(tiny(), random_filters(groups, 0.5, 0)).shuffled(0)
    assert any(kept.tolist() != list(range(len(kept))) for kept in mask.selection.values())


def test_tickets_do_not_fit_into_another_networks_run():
    for mask in masks():
        with pytest.raises(LoftError, match="another network"):
            mask.carve(build(architecture("resnet20", 10), seed=0).state_dict())


def test_levels_of_iterative_pruning():
    """Nineteen of them on the way to 1.44 % (facts: tickets.md), and none below the target."""
    counts = level_counts(270_896, 0.2, round(0.0144 * 270_896))
    assert len(counts) == 20 and counts[1] == round(0.8 * 270_896)
    assert all(after == pytest.approx(0.8 * before, abs=1) for before, after in itertools.pairwise(counts))


def test_freezings_as_the_paper_has_them():
    """E = 150, T = 5, 1.44 %: 29 freezings of 13.6 % each (facts: tickets.md)."""
    plan = freezings(150, 5, 390, 270_896, 3901)
    assert len(plan) == 29 and plan[0][0] == 5 * 390 and plan[-1] == (145 * 390, 3901)
    alive = [270_896, *(count for _, count in plan)]
    assert all(1 - after / before == pytest.approx(0.136, abs=0.0005) for before, after in itertools.pairwise(alive))
    assert freezings(1, 5, 10, 100, 3) == [(10, 3)]


def test_regularisers_and_learning_rates_are_the_papers():
    for density, value in ((0.0144, 1e-4), (0.0372, 3e-5), (0.5, 1e-8), (0.0059, 1e-4), (0.9, 1e-8)):
        assert paper_regulariser(density) == pytest.approx(value)
    assert paper_regulariser(0.1) < paper_regulariser(0.05) < 3e-5
    assert search_rate(150 * 390) == pytest.approx(0.1)


# -- Gem-Miner by hand ----------------------------------------------------------------------------------------------------


def test_the_scores_gradient_of_a_two_weight_network():
    """y = (w1 1[p1 > 1/2] x1 + w2 1[p2 > 1/2] x2), L = (y - t)^2 / 2 + lambda (p1^2 + p2^2), w = (2, -3), x = (1, 4), t = 5, p = (0.7, 0.2):
    y = 2, dL/dp1 = (2 - 5) 1 2 + 2 lambda 0.7 = -6 + 1.4 lambda; dL/dp2 = (2 - 5) 4 (-3) + 2 lambda 0.2 = 36 + 0.4 lambda."""
    weights, scores = torch.tensor([2.0, -3.0]), torch.tensor([0.7, 0.2])
    effective = (weights * (scores > 0.5)).requires_grad_()
    loss = ((effective * torch.tensor([1.0, 4.0])).sum() - 5) ** 2 / 2
    loss.backward()
    alive = torch.ones(2)
    for regulariser in (0.0, 0.1):
        expected = torch.tensor([-6 + 1.4 * regulariser, 36 + 0.4 * regulariser])
        torch.testing.assert_close(score_gradient(effective.grad, weights, scores, alive, regulariser), expected)
    frozen = score_gradient(effective.grad, weights, scores, torch.tensor([1.0, 0.0]), 0.1)
    assert frozen[1] == 0


def test_signed_constants():
    state = build(tiny(), seed=3).state_dict()
    made = signed_constants(state)
    assert torch.equal(made["layer2.0.conv1.weight"].sign(), state["layer2.0.conv1.weight"].sign())
    assert made["layer2.0.conv1.weight"].abs().unique().tolist() == pytest.approx([(2 / (8 * 9)) ** 0.5])
    assert made["bn1.weight"].eq(1).all() and made["bn1.bias"].eq(0).all() and made["fc.bias"].eq(0).all()


# -- masks ----------------------------------------------------------------------------------------------------------------


def masks() -> list:
    state = build(tiny(), seed=1).state_dict()
    return [
        FilterMask(tiny(), largest_filters(state, filter_groups(tiny()), 0.4)),
        BlockMask(tiny(), ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]),
        WeightMask(tiny(), chosen_weights(weight_scores(1), 0.7, "global", 0.0)),
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: mask.kind)
def test_tickets_of_every_kind_survive_the_disk(tmp_path, mask):
    state = build(tiny(), seed=1).state_dict()
    scores = {name: torch.rand(tensor.shape) for name, tensor in mask.tensors().items()}
    Ticket(tmp_path / "t", mask, mask.carve(state), {"method": "x", "cost": {"epochs": 2.5}}, scores).write()
    ticket = Ticket.read(tmp_path / "t")
    assert ticket.mask.kind == mask.kind and ticket.dense == tiny() and ticket.architecture == mask.architecture
    assert all(torch.equal(one, ticket.mask.tensors()[name]) for name, one in mask.tensors().items())
    assert all(torch.equal(one, ticket.scores[name]) for name, one in scores.items())
    assert ticket.cost.epochs == 2.5 and ticket.fingerprint == Ticket.read(tmp_path / "t").fingerprint
    network = build(ticket.architecture, ticket.hidden_widths)
    network.load_state_dict(ticket.state)


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: mask.kind)
def test_shuffled_and_inverted_masks_keep_the_numbers(mask):
    scores = {name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(5)) for name, tensor in mask.tensors().items()}
    others = [mask.shuffled(1), mask.shuffled(2), mask.inverted(scores)]
    for other in others:
        for name, tensor in mask.tensors().items():
            assert int(other.tensors()[name].sum()) == int(tensor.sum())
    assert all(torch.equal(one, mask.shuffled(1).tensors()[name]) for name, one in others[0].tensors().items())
    if mask.kind == "weight":
        assert any(not torch.equal(one, others[1].tensors()[name]) for name, one in others[0].tensors().items())


def test_inverting_keeps_the_lowest():
    scores = weight_scores()
    mask = WeightMask(tiny(), chosen_weights(scores, 0.6, "layer", 0.0))
    turned = mask.inverted(scores).kept
    for name, kept in turned.items():
        assert scores[name][kept.bool()].max() <= scores[name][~kept.bool()].min()
        assert not (kept.bool() & mask.kept[name].bool()).any()


def test_masks_refuse_anything_but_0_and_1():
    for kind, mask in zip((FilterMask, BlockMask, WeightMask), masks(), strict=True):
        good = mask.tensors()
        name = next(iter(good))
        for wrong in (good[name] * 2, good[name].float(), good[name].flatten()[1:], None):
            with pytest.raises(ValueError, match="no mask of 0 and 1"):
                kind.of(tiny(), good | {name: wrong})


def test_blocks_that_change_shape_stay_and_so_does_one_of_every_stage():
    with pytest.raises(ValueError, match=r"layer2\.0, which changes shape"):
        BlockMask(tiny(), ["layer1.0", "layer2.1", "layer3.0"])
    with pytest.raises(ValueError, match="stage 1 without a block"):
        BlockMask(tiny(), ["layer2.0", "layer3.0"])


@pytest.mark.parametrize("pre_activation", [False, True])
def test_a_layer_ticket_equals_the_network_with_those_blocks_skipped(pre_activation):
    model = tiny(pre_activation)
    full = build(model, seed=4).eval()
    mask = BlockMask(model, ["layer1.0", "layer2.0", "layer3.0", "layer3.1"])
    slim = build(mask.architecture)
    slim.load_state_dict(mask.carve(full.state_dict()))
    full.layer2[1] = torch.nn.Identity()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(slim.eval()(x), full(x))


@pytest.mark.parametrize(("model", "share"), [("resnet32", 6.826), ("resnet56", 3.752)])
def test_flops_of_layer_tickets_as_the_paper_prints_them(model, share):
    """6.82 % for a block of ResNet-32, 20.47 for three; ResNet-56: 11.25, 15.00, 18.76, 45.00 for 3, 4, 5, 12 (facts: tickets.md)."""
    dense = architecture(model, 10)
    whole = network_size(dense, None, 32).flops
    names = [shape.name for shape in dense.block_shapes()]
    free = [shape.name for shape in dense.block_shapes() if not shape.changes_shape][1:]
    printed = {"resnet32": {1: 6.82, 3: 20.47, 5: 34.13}, "resnet56": {3: 11.25, 4: 15.00, 5: 18.76, 12: 45.00}}[model]
    for count, value in printed.items():
        mask = BlockMask(dense, [name for name in names if name not in free[:count]])
        saved = 100 * (1 - network_size(mask.architecture, None, 32).flops / whole)
        # the paper's network has 1x1 shortcuts too; what it rounds is the share of a block times their number
        assert saved == pytest.approx(count * share, abs=0.01) and saved == pytest.approx(value, abs=0.05)


def test_size_of_a_ticket_of_weights():
    mask = WeightMask(tiny(), chosen_weights(weight_scores(), 0.9, "global", 0.0))
    dense, own = network_size(tiny(), None, 8), ticket_size(tiny(), None, mask.weights, 8)
    assert dense.parameters - own.parameters == mask.total - mask.count
    ones = {name: torch.ones_like(kept) for name, kept in mask.kept.items()}
    assert ticket_size(tiny(), None, ones, 8) == dense
    lone = {name: torch.zeros_like(kept) for name, kept in mask.kept.items()}
    lone["layer2.0.conv1.weight"][0, 0, 0, 0] = 1  # 12 channels of 4x4 pixels, one weight of one of them
    assert ticket_size(tiny(), None, lone, 8).flops == 2 * 4 * 4


def test_torch_pruning_agrees_on_the_shapes():
    import torch_pruning

    state = build(tiny(), seed=1).state_dict()
    mask = FilterMask(tiny(), largest_filters(state, filter_groups(tiny()), 0.4))
    theirs = build(tiny(), seed=1).eval()
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=torch.randn(1, 1, 8, 8))
    for group in filter_groups(tiny()):
        gone = sorted(set(range(group.width)) - set(mask.selection[group.name].tolist()))
        layer = theirs.get_submodule(f"{group.name}.conv1")
        graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=gone).prune()
    ours = mask.carve(state)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    slim = build(tiny(), mask.hidden_widths)
    slim.load_state_dict(ours)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(slim.eval()(x), theirs(x))


# -- options --------------------------------------------------------------------------------------------------------------


def test_every_finder_explains_itself_and_is_named_apart():
    assert {"magnitude", "random", "bn-scale", "gem-miner", "edge-popup", "layers", "imp", "early-bird", "loft"} == FINDERS.keys()
    names = {(name, *finder.label(finder.options())) for name, finder in FINDERS.items()}
    assert len(names) == len(FINDERS) and all(finder.help and finder.find.__doc__ for finder in FINDERS.values())


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("random", {"criterion": "l2"}, "belongs to --method magnitude"),
        ("layers", {"criterion": "l2"}, "unknown criterion"),
        ("gem-miner", {"freeze_every": 0}, "--freeze-every"),
        ("gem-miner", {"regulariser": -1.0}, "--regulariser"),
        ("gem-miner", {"search_lr": float("nan")}, "--search-lr"),
        ("imp", {"rewind_to": "3"}, None),
        ("imp", {"rewind_to": "3 epochs"}, "--rewind-to"),
        ("imp", {"level_ratio": 1.0}, "--level-ratio"),
        ("magnitude", {"floor": 1.5}, "--floor"),
        ("random", {"profile": "smart-ratio"}, "--unit weights"),
        ("early-bird", {"patience": 0}, "--patience"),
        ("luck", {}, "unknown method"),
    ],
)
def test_options_that_mean_nothing_are_refused(method, options, says):
    if says is None:
        Pruning.of(0.5, method, **options)
        return
    with pytest.raises(LoftError, match=says):
        Pruning.of(0.5, method, **options)


def test_the_example_in_the_architecture_page_is_a_finder():
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    code = textwrap.dedent(re.search(r"(    @dataclass\(frozen=True\)\n    class OldestOptions.*?)\n## ", page, re.DOTALL)[1])
    names = {
        "dataclass": dataclass, "option": option, "register": register, "Source": object, "Sequence": Sequence, "Iterator": Iterator, "Found": Found,
        "torch": torch, "kept_count": kept_count, "FilterMask": FilterMask,
    }  # fmt: skip
    try:
        exec(code, names)
        state = build(tiny(), seed=0).state_dict()
        source = SimpleNamespace(
            at="final",
            architecture=tiny(),
            groups=filter_groups(tiny()),
            state=lambda at: state,
            file=lambda at: "",
            cost=lambda at: Cost(),
        )
        pruning = Pruning.of(0.5, "oldest")
        (found,) = pruning.finder.find(source, pruning.options, [0.5])
        assert found.mask.selection["layer2.1"].tolist() == list(range(6))
    finally:
        FINDERS.pop("oldest", None)


# -- widths for real speed ---------------------------------------------------------------------------------------------------

ROUNDING = [("magnitude", {}), ("magnitude", {"criterion": "l1", "scope": "global"}), ("loft", {}), ("random", {"seed": 3}), ("bn-scale", {}),
            ("bn-scale", {"scope": "layer"}), ("early-bird", {"patience": 1})]  # fmt: skip
"""Every finder of filters, in every scope."""


def drawn_source(path: Path, draw: Random, multiple: int) -> SimpleNamespace:
    """A LoFT run's network of random widths, no narrower than `multiple`, with snapshots of rankings that stand still."""
    widths = tuple(draw.randint(max(8, multiple), 5 * multiple + 8) for _ in range(3))
    dense = Architecture("drawn", (1, 2, 1), widths, False, 1, "cifar", 1, 10)
    groups = filter_groups(dense)
    state = build(dense, seed=draw.randrange(1000)).state_dict()
    for group in groups:
        state[group.scale].copy_(torch.tensor([draw.choice((0.25, 0.5, draw.random())) for _ in range(group.width)]))  # some are equal
    run = Run.create(path, "pretrain", {"strategy": "loft"}, {"architecture": dense.to_json(), "steps_per_epoch": 1, "total_steps": 2})
    for step in range(3):
        run.snapshots.write_scores(step, filter_scores(state, groups))
    run.snapshots.write("epoch-002", state)
    return SimpleNamespace(
        run=run, at="emerged", architecture=dense, groups=groups, state=lambda at: state, file=str, cost=lambda at: Cost()
    )


def nearest(count: int, width: int, multiple: int) -> int:
    """By looking at all multiples: the nearest, of two the larger, and no more than the layer has."""
    multiples = range(multiple, width + multiple, multiple)
    return min(width, min(multiples, key=lambda candidate: (abs(candidate - count), -candidate)))


MULTIPLES = (2, 3, 5, 8, 8, 16)


@pytest.fixture(scope="module")
def drawn_sources(tmp_path_factory) -> list[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("drawn")
    return [drawn_source(folder / str(seed), Random(seed), multiple) for seed, multiple in enumerate(MULTIPLES)]


@pytest.mark.parametrize(("method", "options"), ROUNDING)
def test_rounded_widths_are_the_nearest_multiples_and_stay_nested(drawn_sources, method, options):
    for source, multiple in zip(drawn_sources, MULTIPLES, strict=True):
        draw = Random(multiple)
        wider: dict[str, set[int]] = {group.name: set(range(group.width)) for group in source.groups}
        for ratio in sorted(draw.uniform(0.02, 0.85) for _ in range(5)):
            (plain,) = FINDERS[method].find(source, FINDERS[method].options(**options), [ratio])
            dense = source.architecture.hidden_widths()
            expected = {name: nearest(count, dense[name], multiple) for name, count in plain.mask.hidden_widths.items()}
            rounding = Pruning.of(ratio, method, **options, round_to=multiple)
            if expected == dense != plain.mask.hidden_widths:
                with pytest.raises(LoftError, match="leaves every layer whole"):
                    list(rounding.finder.find(source, rounding.options, [ratio]))
                continue
            (found,) = rounding.finder.find(source, rounding.options, [ratio])
            assert found.mask.hidden_widths == expected
            assert f"-by{multiple}" in ticket_name(rounding, "all", "emerged", source.architecture)
            for name, kept in found.mask.selection.items():
                own, unrounded = set(kept.tolist()), set(plain.mask.selection[name].tolist())
                assert len(own) % multiple == 0 or len(own) == dense[name]
                assert own <= unrounded or own >= unrounded  # the best by the same ranking, more or fewer of them
                assert own <= wider[name]
                wider[name] = own


def test_a_multiple_beyond_a_layer_names_it_and_what_works(tmp_path):
    source = drawn_source(tmp_path / "run", Random(0), 8)
    narrowest = min(source.architecture.widths)
    for method, options in ROUNDING:
        with pytest.raises(LoftError, match=rf"filters of layer\d\.\d: give --round-to {narrowest} or less") as told:
            list(FINDERS[method].find(source, FINDERS[method].options(**options, round_to=narrowest + 1), [0.5]))
        assert told.value.usage
        list(FINDERS[method].find(source, FINDERS[method].options(**options, round_to=narrowest), [0.5]))
    for method, options in (
        ("magnitude", {"unit": "weights"}),
        ("random", {"unit": "weights"}),
        ("layers", {}),
        ("imp", {}),
        ("gem-miner", {}),
    ):
        with pytest.raises(LoftError, match="--round-to") as told:
            Pruning.of(0.5, method, **options, round_to=8)
        assert told.value.usage
    assert Pruning.of(0.5, unit="weights", round_to=1).options.unit == "weights"


@pytest.mark.parametrize("widths", [(16, 32, 64), (8, 12, 16), (24, 24, 40)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_random_control_of_filters_has_as_many_parameters(widths, scope):
    """Nearer than one more or one less portion of filters could come; in multiples where the ticket has them."""
    dense = Architecture("drawn", (1, 1, 1), widths, False, 1, "cifar", 1, 10)
    state = build(dense, seed=0).state_dict()
    for ratio, multiple in itertools.product((0.3, 0.5, 0.8), (1, 4, 8)):
        options = Pruning.of(ratio, scope=scope, round_to=multiple).options
        mask = FilterMask(dense, largest_filters(state, filter_groups(dense), ratio, options))
        control = random_like(mask, 1, multiple)
        mine, other = (ticket_size(dense, one.hidden_widths, None, 8).parameters for one in (mask, control))
        portion = multiple * (9 * 2 * max(widths) + 2)
        assert abs(mine - other) <= portion
        if all(width % multiple == 0 for width in widths):
            assert all(width % multiple == 0 for width in control.hidden_widths.values())
