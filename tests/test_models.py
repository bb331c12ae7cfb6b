"""Networks: against torchvision, against published parameter counts, and the algebra of filter groups."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loft_hpc.analysis.size import network_size
from loft_hpc.analysis.traffic import division
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.partition import deal
from loft_hpc.models.architecture import MODEL_NAMES, Architecture, architecture
from loft_hpc.models.groups import (
    Holding,
    _take,
    _take_columns,
    filter_groups,
    mask_state,
    merge_states,
    partitioned_groups,
    shares,
    slice_state,
)
from loft_hpc.models.resnet import Shortcut, build

from tiny import tiny

# Models whose merge is cheap enough to try for all worker counts; the others differ from them in the number of blocks alone.
ALL_MODELS = pytest.mark.parametrize("model", MODEL_NAMES)


@pytest.mark.parametrize("model", ["resnet18", "resnet34"])
def test_torchvisions_weights_load_and_give_identical_outputs(model):
    theirs = getattr(torchvision.models, model)(weights=None)
    ours = build(architecture(model, 1000, stem="imagenet"))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for mode in (False, True):
        assert torch.equal(theirs.train(mode)(x), ours.train(mode)(x))


@pytest.mark.parametrize(
    ("model", "classes", "stem", "widen", "parameters"),
    [
        ("resnet18", 1000, "imagenet", 1, 11_689_512),  # torchvision's documentation
        ("resnet34", 1000, "imagenet", 1, 21_797_672),  # torchvision's documentation
        ("resnet20", 10, "cifar", 1, 272_474),  # chenyaofo/pytorch-cifar-models: 0.27M
        ("resnet32", 10, "cifar", 1, 466_906),  # the same: 0.47M
        ("resnet44", 10, "cifar", 1, 661_338),  # the same: 0.66M
        ("resnet56", 10, "cifar", 1, 855_770),  # the same: 0.86M
        ("resnet110", 10, "cifar", 1, 1_730_714),  # He et al. 2016, table 6: 1.7M
        ("resnet18", 10, "cifar", 1, 11_173_962),  # kuangliu/pytorch-cifar ResNet18
        ("resnet34", 10, "cifar", 1, 21_282_122),  # kuangliu/pytorch-cifar ResNet34
        # The poster's networks: shared plus partitioned of facts/loft.md, from its communication column.
        ("preresnet34", 10, "cifar", 2, 9_922_122 + 32_451_072),
        ("resnet34", 10, "cifar", 2, 9_924_810 + 32_451_072),
        ("preresnet34", 100, "cifar", 2, 9_968_292 + 32_451_072),
        ("resnet34", 100, "cifar", 2, 9_970_980 + 32_451_072),
        ("preresnet18", 1000, "imagenet", 2, 10_286_248 + 12_389_888),
        ("wideresnet18", 1000, "imagenet", None, 10_286_248 + 12_389_888),
        ("wideresnet34", 10, "cifar", None, 9_922_122 + 32_451_072),
    ],
)
def test_published_parameter_counts(model, classes, stem, widen, parameters):
    assert network_size(architecture(model, classes, stem=stem, widen=widen), None, 32).parameters == parameters


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_pre_activation_cifar_networks_lack_just_the_norms_that_the_arrangement_lacks(depth):
    """Against the published post-activation count: a block's second norm moves to its input, shortcuts lose theirs."""
    post, pre = (network_size(architecture(f"{kind}resnet{depth}", 10), None, 32).parameters for kind in ("", "pre"))
    moved = 2 * ((32 - 16) + (64 - 32))
    shortcuts = 2 * (32 + 64)
    assert post - pre == moved + shortcuts


def test_flops_count_a_multiply_add_as_two():
    assert network_size(architecture("resnet18", 1000, stem="imagenet"), None, 224).flops == 2 * 1_814_073_344
    # tickets.md: with 1x1 shortcuts a removed block of ResNet-32 is 6.826 % of its multiply-adds, of ResNet-56 3.752 %
    for depth, share in ((32, 6.826), (56, 3.752)):
        full = network_size(architecture(f"resnet{depth}", 10), None, 32).flops
        block = 2 * 2 * 9 * 16 * 16 * 32 * 32
        assert 100 * block / full == pytest.approx(share, abs=0.001)


@ALL_MODELS
@pytest.mark.parametrize("rule", ["paper", "all-blocks"])
def test_merge_is_the_inverse_of_slice(model, rule):
    network = architecture(model, 10, 1)
    groups = partitioned_groups(filter_groups(network), rule)
    state = {name: torch.randn_like(tensor.float()) for name, tensor in build(network).state_dict().items()}
    for workers in (1, 2, 3, 4, 8):
        hands = deal(groups, workers, seed=workers, round_number=3)
        merged = merge_states([Holding(slice_state(state, hand, groups), hand) for hand in hands], groups)
        assert list(merged) == list(state)
        assert all(torch.equal(merged[name], state[name]) for name in state)


@ALL_MODELS
def test_a_slice_fits_the_network_with_those_widths(model):
    network = architecture(model, 10, 1)
    groups = filter_groups(network)
    hand = deal(groups, 3, seed=0, round_number=0)[1]
    part = slice_state(build(network, seed=0).state_dict(), hand, groups)
    build(network, {name: len(kept) for name, kept in hand.items()}).load_state_dict(part)


@pytest.mark.parametrize("model", ["resnet20", "preresnet20", "resnet18", "wideresnet18"])
@pytest.mark.parametrize("train", [False, True])
def test_a_sub_network_equals_the_full_network_with_the_other_filters_masked(model, train):
    network = architecture(model, 10, 1)
    groups = filter_groups(network)
    full = build(network, seed=1)
    for module in full.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # nothing may hide behind trivial statistics
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    state = full.state_dict()
    hand = deal(groups, 4, seed=2, round_number=0)[0]
    slim = build(network, {name: len(kept) for name, kept in hand.items()})
    slim.load_state_dict(slice_state(state, hand, groups))
    masked = build(network)
    masked.load_state_dict(mask_state(state, hand, groups))
    x = torch.randn(8, 1, 16, 16)
    with torch.no_grad():
        expected, output = masked.train(train)(x), slim.train(train)(x)
        assert not torch.allclose(full.train(train)(x), expected, rtol=1e-2)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_deals_are_disjoint_complete_fresh_and_uniform():
    groups = filter_groups(tiny())
    for workers in (1, 2, 3, 5):
        hands = deal(groups, workers, seed=1, round_number=0)
        for group in groups:
            held = torch.cat([hand[group.name] for hand in hands])
            assert sorted(held.tolist()) == list(range(group.width))
            assert [len(hand[group.name]) for hand in hands] == shares(group.width, workers)
    in_units = partitioned_groups(groups, "paper", unit=4)  # of 12 and 16 filters
    hands = deal(in_units, 3, seed=1, round_number=0)
    assert [[len(hand[group.name]) for hand in hands] for group in in_units] == [[4, 4, 4], [8, 4, 4]]
    rounds = [deal(groups, 2, seed=1, round_number=number)[0]["layer1.0"].tolist() for number in range(400)]
    assert rounds[0] == deal(groups, 2, seed=1, round_number=0)[0]["layer1.0"].tolist()
    assert len({tuple(hand) for hand in rounds}) > 60  # of 70 possible
    frequency = torch.bincount(torch.tensor(rounds).flatten(), minlength=8) / 400
    assert torch.all((frequency - 0.5).abs() < 0.1)  # four standard deviations


@pytest.mark.parametrize("channels", [1, 4, 7, 8, 12])
def test_gradients_of_a_narrow_networks_strided_shortcuts(channels):
    """Against double precision: oneDNN issue 6035 made them wrong by orders of magnitude, or killed the process."""
    x = torch.randn(16, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    wanted = torch.randn(16, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    single = Shortcut(channels, 8, 1, 2, bias=False).to(memory_format=torch.channels_last)
    double = nn.Conv2d(channels, 8, 1, 2, bias=False).double()
    double.load_state_dict(single.state_dict())
    outputs = single(x), double(x.double())
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-4)
    outputs[0].backward(wanted)
    outputs[1].backward(wanted.double())
    torch.testing.assert_close(single.weight.grad.double(), double.weight.grad, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 600), st.integers(1, 70), st.integers(1, 64))
def test_shares_are_whole_units_where_the_width_allows(width, workers, unit):
    held = shares(width, workers, unit)
    assert sum(held) == width and len(held) == workers and held == sorted(held, reverse=True)
    whole = width % unit == 0 and width // unit >= workers
    assert held[0] - held[-1] <= (unit if whole else 1)
    if whole:
        assert all(share % unit == 0 and share for share in held)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_columns_are_taken_alike_on_cpu_and_gpu_paths(memory_format):
    """`_take_columns` serves CPUs, `_take` GPUs; both are the concatenation indexed."""
    sources = [torch.randn(40, width, 3, 3).contiguous(memory_format=memory_format) for width in (7, 5, 6)]
    pick = torch.randperm(18)[:9]
    expected = torch.cat(sources, 1)[:, pick]
    for take in (lambda target: _take_columns(target, sources, pick), lambda target: _take(target, sources, pick, 1)):
        target = torch.full((40, 9, 3, 3), float("nan")).contiguous(memory_format=memory_format)
        take(target)
        assert torch.equal(target, expected)


def test_the_papers_rule_leaves_stage_1_and_strided_blocks_whole():
    names = [group.name for group in partitioned_groups(filter_groups(architecture("preresnet34", 10)), "paper")]
    assert names == [f"layer{stage}.{block}" for stage, count in ((2, 4), (3, 6), (4, 3)) for block in range(1, count)]
    assert division(architecture("preresnet34", 10, widen=2), "all-blocks").shared == 185_674  # issue: 0.19M


def test_initialisation_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, other = build(tiny(), seed=3), build(tiny(), seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.conv1.weight, build(tiny(), seed=4).conv1.weight)


@pytest.mark.parametrize("change", [{"model": "resnet19"}, {"model": "vgg16"}, {"widen": 0}, {"widen": 0.001}, {"stem": "round"}])
def test_impossible_networks_are_refused(change):
    with pytest.raises(LoftError):
        architecture(**{"model": "resnet18", "num_classes": 10} | change)


def test_architecture_survives_json():
    network = architecture("wideresnet34", 100, stem="imagenet")
    assert Architecture.from_json(network.to_json()) == network
    with pytest.raises(LoftError, match="blocks"):
        Architecture.from_json({"model": "x"} | {})
