"""What blocks are worth: every criterion against its definition, on networks of a few filters and in a world of one rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loft_hpc.comm.start import start
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import DataInfo, TensorDataSet
from loft_hpc.data.embedded import digits
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.resnet import build
from loft_hpc.tickets.block_scores import BLOCK_CRITERIA, BlockScoring, lowest_blocks, removable

from tiny import CPU, tiny

SCORING = BlockScoring(batches=3, batch_size=6)  # of 16 images: the last batch has 4
both_orders = pytest.mark.parametrize("pre_activation", [False, True], ids=["post-activation", "pre-activation"])


@pytest.fixture(scope="module")
def world():
    return start()


def small(pre_activation: bool, blocks=(2, 2)) -> Architecture:
    """Two stages of 2 and 3 channels: few enough weights to try each."""
    return Architecture("small", blocks, (2, 3), pre_activation, 1, "cifar", 1, 3)


def network_of(architecture: Architecture, dtype=torch.float64):
    """Random weights, normalisations and statistics."""
    network = build(architecture, seed=1).to(dtype)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() == 1:
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=draw, dtype=dtype))
            if name.endswith("running_mean"):
                tensor.sub_(0.15)
    return network


class Images(TensorDataSet):
    """Training images that are network input already."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: int):
        self.info = DataInfo("made", classes, images.shape[1], images.shape[2], "cifar", len(images), 0, "")
        self._augmentation = Augmentation(padding=0, flip=False)
        self._train = images, labels


def noise(dtype=torch.float64) -> TensorDataSet:
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(16, 1, 6, 6, generator=draw, dtype=torch.float64).to(dtype)
    return Images(images, torch.randint(3, (16,), generator=draw), 3)


def mean_loss(network, data: TensorDataSet) -> torch.Tensor:
    """Over all images, each batch normalised by itself."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    batches = list(data.calibration_batches(SCORING.batches, SCORING.batch_size, 0, 1))
    return sum(F.cross_entropy(network(images), labels, reduction="sum") for images, labels in batches) / sum(
        len(one) for _, one in batches
    )


def weights_of(network) -> list[nn.Parameter]:
    return [module.weight for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def outputs_of(network, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the blocks hand on while the network runs as a whole."""
    found = {}
    for name, module in network.eval().named_modules():
        if name.startswith("layer") and name.count(".") == 1:
            module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output.clone()}))
    with torch.no_grad():
        network(images)
    return found


@both_orders
def test_snip_is_what_a_mask_on_each_weight_would_change(world, pre_activation):
    """|d loss / d c| for a factor c on one weight, by central differences, summed over the weights."""
    network, data = network_of(small(pre_activation)), noise()
    scores = BLOCK_CRITERIA["snip"](network, data, SCORING, world)
    for name in ("layer1.0", "layer1.1"):
        total = 0.0
        for weight in (network.get_submodule(name).conv1.weight, network.get_submodule(name).conv2.weight):
            flat = weight.data.view(-1)
            for index, value in enumerate(flat.tolist()):
                losses = []
                for factor in (1 + 1e-5, 1 - 1e-5):
                    flat[index] = value * factor
                    with torch.no_grad():
                        losses.append(float(mean_loss(network, data)))
                flat[index] = value
                total += abs(losses[0] - losses[1]) / 2e-5
        assert scores[name] == pytest.approx(total, rel=1e-4)


@both_orders
def test_grasp_is_how_the_gradient_norm_changes_with_the_block(world, pre_activation):
    """d/de of 1/2 |g|^2 with the block's convolutions at (1 + e) times their weights, by central differences."""
    network, data = network_of(small(pre_activation)), noise()
    scores = BLOCK_CRITERIA["grasp"](network, data, SCORING, world)
    for name in removable(small(pre_activation)):
        block, flows = network.get_submodule(name), []
        for factor in (1 + 1e-6, 1 - 1e-6):
            with torch.no_grad():
                originals = [weight.clone() for weight in (block.conv1.weight, block.conv2.weight)]
                block.conv1.weight.mul_(factor)
                block.conv2.weight.mul_(factor)
            gradient = torch.autograd.grad(mean_loss(network, data), weights_of(network))
            flows.append(sum(float(part.square().sum()) for part in gradient) / 2)
            with torch.no_grad():
                block.conv1.weight.copy_(originals[0])
                block.conv2.weight.copy_(originals[1])
        assert scores[name] == pytest.approx((flows[0] - flows[1]) / 2e-6, rel=1e-4)


def test_grasp_of_normalised_convolutions_is_minus_their_squared_gradient(world):
    """Their scale does not matter to the loss, so the gradient shrinks as the weights grow (but for the epsilon of the normalisation)."""
    network, data = network_of(small(False)), noise()
    scores = BLOCK_CRITERIA["grasp"](network, data, SCORING, world)
    for name in removable(small(False)):
        block = network.get_submodule(name)
        gradient = torch.autograd.grad(mean_loss(network, data), [block.conv1.weight, block.conv2.weight])
        assert scores[name] == pytest.approx(-sum(float(part.square().sum()) for part in gradient), rel=1e-2)


@both_orders
@pytest.mark.parametrize("criterion", BLOCK_CRITERIA)
def test_scoring_leaves_no_trace(world, criterion, pre_activation):
    network, data = network_of(small(pre_activation), torch.float32), noise(torch.float32)
    network.train()
    network.layer2[1].eval()
    network.layer1[0].bn1.track_running_stats = False
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [(module.training, getattr(module, "track_running_stats", None)) for module in network.modules()]
    with torch.no_grad():
        scores = BLOCK_CRITERIA[criterion](network, data, SCORING, world)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [(module.training, getattr(module, "track_running_stats", None)) for module in network.modules()] == modes
    assert list(scores) == removable(small(pre_activation))
    assert scores == BLOCK_CRITERIA[criterion](network.eval(), data, SCORING, world)


@both_orders
@pytest.mark.parametrize("name", removable(small(False)))
def test_a_block_that_adds_nothing_is_worth_nothing_by_kl(world, name, pre_activation):
    network = network_of(small(pre_activation), torch.float32)
    block = network.get_submodule(name)
    nn.init.zeros_(block.conv2.weight if pre_activation else block.bn2.weight)
    if not pre_activation:
        nn.init.zeros_(block.bn2.bias)
    scores = BLOCK_CRITERIA["kl"](network, noise(torch.float32), SCORING, world)
    assert scores.pop(name) == 0 < min(scores.values())


@both_orders
@pytest.mark.parametrize("name", removable(small(False)))
def test_kl_is_that_of_a_network_built_without_the_block(world, name, pre_activation):
    network, data = network_of(small(pre_activation)), noise()
    stage, number = int(name[5]), int(name[7])
    blocks = tuple(count - (index == stage) for index, count in enumerate((2, 2), start=1))
    without, kept = build(small(pre_activation, blocks)).double(), network.state_dict()
    state = {entry: tensor for entry, tensor in kept.items() if not entry.startswith(f"{name}.")}
    if number == 0:  # the second block moves up
        state = {entry.replace(f"layer{stage}.1.", f"layer{stage}.0."): tensor for entry, tensor in state.items()}
    without.load_state_dict(state)
    images = torch.cat([images for images, _ in data.calibration_batches(3, 6, 0, 1)])
    with torch.no_grad():
        p, q = network.eval()(images).softmax(1), without.eval()(images).softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert BLOCK_CRITERIA["kl"](network, data, SCORING, world)[name] == pytest.approx(expected, rel=1e-9)


@both_orders
def test_expected_activations_and_norms_are_plain_means(world, pre_activation):
    network, data = network_of(small(pre_activation)), noise()
    activations, norms = (BLOCK_CRITERIA[criterion](network, data, SCORING, world) for criterion in ("expect-abs", "l1"))
    outputs = outputs_of(network, torch.cat([images for images, _ in data.calibration_batches(3, 6, 0, 1)]))
    for name in removable(small(pre_activation)):
        block = network.get_submodule(name)
        assert activations[name] == pytest.approx(float(outputs[name].abs().mean()), rel=1e-12)
        weights = torch.cat([block.conv1.weight.flatten(), block.conv2.weight.flatten()]).detach()
        assert norms[name] == pytest.approx(float(weights.abs().mean()), rel=1e-12)


@pytest.mark.parametrize(("pre_activation", "alive"), [(False, 2), (True, 3)])
def test_ranks_of_known_maps(world, pre_activation, alive):
    """Four channels are the image times 1, 2, -1 and 0, half of the images constant and half of them an identity of 8 x 8.

    The ReLU of a post-activation network leaves nothing of the third; the second stage's shortcut hands on zeros.
    """
    network = build(Architecture("known", (2, 2), (4, 4), pre_activation, 1, "cifar", 1, 3), seed=0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
        network.conv1.weight[:, 0, 1, 1] = torch.tensor([1.0, 2.0, -1.0, 0.0])
    images = torch.stack([torch.ones(8, 8), torch.eye(8)] * 8).unsqueeze(1)
    scores = BLOCK_CRITERIA["hrank"](network, Images(images, torch.zeros(16, dtype=torch.int64), 3), SCORING, world)
    share = alive / 4 * (1 + 8) / 2
    assert scores == {"layer1.0": share, "layer1.1": share, "layer2.1": 0.0}


@pytest.mark.parametrize(("criterion", "large", "exact"), [("hrank", (1, 200), (2, 64)), ("pls", (1, 1400), (4, 256))])
def test_of_many_images_the_first_are_looked_at(world, criterion, large, exact):
    network, data = network_of(tiny(), torch.float32), digits(CPU)
    first, second = (BLOCK_CRITERIA[criterion](network, data, BlockScoring(*sizes), world) for sizes in (large, exact))
    assert first == pytest.approx(second, rel=1e-3)


def importance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Variable importance in projection from two components, each by a singular value decomposition of the cross-covariance."""
    x, y = ((table - table.mean(0)) / np.where(table.std(0) == 0, 1, table.std(0)) for table in (features, labels))
    weights, explained = [], []
    for _ in range(2):
        w = np.linalg.svd(x.T @ y)[0][:, 0]
        t = x @ w
        weights.append(w**2)
        explained.append((t @ y) @ (t @ y) / (t @ t))
        x, y = x - np.outer(t, t @ x) / (t @ t), y - np.outer(t, t @ y) / (t @ t)
    return np.sqrt(x.shape[1] * (explained @ np.array(weights)) / np.sum(explained))


@both_orders
def test_pls_is_the_mean_importance_of_a_blocks_channels(world, pre_activation):
    network, data = network_of(tiny(pre_activation)), digits(CPU)
    double = Images(data._train[0].double(), data._train[1], 10)
    scores = BLOCK_CRITERIA["pls"](network, double, BlockScoring(3, 50), world)
    batches = list(double.calibration_batches(3, 50, 0, 1))
    outputs = {name: maps.mean((2, 3)).numpy() for name, maps in outputs_of(network, torch.cat([one for one, _ in batches])).items()}
    labels = torch.cat([one for _, one in batches])
    expected = importance(np.hstack(list(outputs.values())), F.one_hot(labels, 10).numpy())
    ends = np.cumsum([features.shape[1] for features in outputs.values()])
    means = dict(zip(outputs, (part.mean() for part in np.split(expected, ends[:-1])), strict=True))
    assert scores == pytest.approx({name: means[name] for name in removable(tiny())}, rel=1e-3)


def test_pls_finds_the_block_that_carries_the_label(world):
    """The first block hands on noise and the label; the second lets the label die in its ReLU."""
    network = build(Architecture("label", (3,), (4,), False, 1, "cifar", 2, 2), seed=0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
        network.conv1.weight[:2, 0, 1, 1] = network.conv1.weight[2:, 1, 1, 1] = torch.tensor([1.0, 2.0])
        network.layer1[1].bn2.bias[2:] = -1000
    labels = torch.arange(60) % 2
    images = torch.rand(60, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 1] += labels.view(-1, 1, 1)
    scores = BLOCK_CRITERIA["pls"](network, Images(images, labels, 2), BlockScoring(4, 15), world)
    assert scores["layer1.0"] > 2 * scores["layer1.1"] and scores["layer1.1"] == pytest.approx(scores["layer1.2"])


@pytest.mark.parametrize("alike", ["images", "labels"])
def test_pls_of_what_does_not_differ_is_nothing(world, alike):
    images, labels = noise()._train
    data = Images(images[:1].expand(16, 1, 6, 6), labels, 3) if alike == "images" else Images(images, labels * 0, 3)
    assert set(BLOCK_CRITERIA["pls"](network_of(small(False)), data, SCORING, world).values()) == {0.0}


def test_random_scores_follow_their_seed(world):
    network, data = build(architecture("resnet56", 10, 1), seed=0), digits(CPU)
    first, again, other = (BLOCK_CRITERIA["random"](network, data, BlockScoring(seed=seed), world) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first.values())) == len(first) == 25 and all(0 <= score < 1 for score in first.values())


@pytest.mark.parametrize("criterion", [name for name in BLOCK_CRITERIA if name != "random"])
def test_a_broken_network_is_refused(world, criterion):
    network = network_of(small(False))
    network.layer1[1].conv1.weight.data[0] = float("nan")
    with pytest.raises(LoftError, match="no finite score"):
        BLOCK_CRITERIA[criterion](network, noise(), SCORING, world)


@pytest.mark.parametrize("criterion", [name for name in BLOCK_CRITERIA if name not in ("random", "l1")])
def test_one_image_is_not_enough(world, criterion):
    images, labels = noise()._train
    with pytest.raises(LoftError, match="training images"):
        BLOCK_CRITERIA[criterion](network_of(small(False)), Images(images[:1], labels[:1], 3), SCORING, world)


@pytest.mark.parametrize("wrong", [{"batches": 0}, {"batch_size": 1}, {"batch_size": 1_000_000}, {"batches": 1_000_000}, {"seed": -1}])
def test_wrong_scoring_is_refused(wrong):
    with pytest.raises(LoftError):
        replace(BlockScoring(), **wrong)


@both_orders
def test_removable_blocks_have_the_identity_for_a_shortcut(pre_activation):
    network = build(tiny(pre_activation))
    assert removable(tiny(pre_activation)) == ["layer1.0", "layer2.1", "layer3.1"]
    assert all(network.get_submodule(name).downsample is None for name in removable(tiny(pre_activation)))
    assert len(removable(architecture("resnet32", 10))) == 15 - 2


LARGE = Architecture("large", (3, 3, 1), (2, 3, 4), False, 1, "cifar", 1, 10)


def test_the_lowest_go_first_and_every_count_holds_the_smaller_ones():
    scores = {"layer1.0": 0.3, "layer1.1": -2.0, "layer1.2": 5.0, "layer2.1": 0.2, "layer2.2": 4.0}
    order = ["layer1.1", "layer2.1", "layer1.0", "layer2.2"]
    assert [lowest_blocks(scores, LARGE, count) for count in range(5)] == [order[:count] for count in range(5)]


def test_among_equals_the_later_goes_first():
    assert lowest_blocks(dict.fromkeys(removable(LARGE), 1.0), LARGE, 4) == ["layer2.2", "layer2.1", "layer1.2", "layer1.1"]


def test_every_stage_keeps_a_block():
    scores = {"layer1.0": 3.0, "layer1.1": 1.0, "layer1.2": 2.0, "layer2.1": 10.0, "layer2.2": 9.0}
    assert lowest_blocks(scores, LARGE, 3) == ["layer1.1", "layer1.2", "layer2.2"]
    for count in (5, -1):
        with pytest.raises(LoftError, match="at most 4 can"):
            lowest_blocks(scores, LARGE, count)
    assert lowest_blocks({"layer1.0": 0, "layer2.1": 1, "layer3.1": 2}, tiny(), 2) == ["layer2.1", "layer3.1"]
