"""Attacks and corruptions against what they must be by hand, and the readers of shifted test sets on files as large as the real ones."""

import io
import math
from zipfile import ZipFile

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

from loft_hpc.analysis.robustness import (
    ATTACKS,
    CORRUPTIONS,
    SEVERITIES,
    Attack,
    Corruption,
    attacked,
    attacked_score,
    corrupted,
    corrupted_accuracy,
    corrupted_score,
)
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import DataInfo, PixelRange, TensorDataSet
from loft_hpc.data.embedded import digits, textures
from loft_hpc.data.order import Order
from loft_hpc.data.shifted import cifar10_1, cifar10_2, cifar_c
from loft_hpc.errors import LoftError
from loft_hpc.models.resnet import build
from loft_hpc.training.evaluation import Score, score
from loft_hpc.training.settings import Evaluation

from tiny import CPU, tiny

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BLACK, WHITE = (0 - 4.884) / 6.017, (16 - 4.884) / 6.017
"""Of digits, whose pixels go from 0 to 16."""


class Part:
    """One rank of a world in which nobody answers: sums stay its own."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size

    def paced(self, items):
        return iter(items)

    def all_reduce_(self, tensor, purpose):
        return lambda: tensor


def linear(inputs: int, classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)).eval()


def first_digits(count: int):
    return next(digits(CPU).test_batches(count, 0, 1))


def bytes_like_cifar(name="cifar10", classes=10) -> TensorDataSet:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.arange(40) % classes
    info = DataInfo(name, classes, 3, 32, "cifar", 40, 40, "")
    augmentation = Augmentation(padding=4, flip=True, mean=MEAN, std=STD)
    return TensorDataSet(info, (images, labels), (images, labels), augmentation, PixelRange.normalised(MEAN, STD), CPU)


def photographs(size: int, count: int = 12) -> torch.Tensor:
    """(count, 3, size, size) pixels of a cat and an astronaut."""
    pictures = [skimage.data.chelsea(), skimage.data.astronaut()]
    crops = [pictures[n % 2][(start := 12 * (n // 2 + 1)) : start + size, 2 * start : 2 * start + size] for n in range(count)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def test_network_input_is_mapped_to_pixels_and_back():
    data = digits(CPU)
    images, _ = next(data.test_batches(100, 0, 1))
    sixteenths = 16 * data.pixels.to_pixels(images)
    whole = sixteenths.round()
    assert torch.allclose(sixteenths, whole, atol=1e-4) and set(whole.unique().tolist()) == set(range(17))
    assert torch.allclose(data.pixels.to_input(whole / 16), images, atol=1e-5)

    data = bytes_like_cifar()
    images, _ = next(data.test_batches(40, 0, 1))
    assert torch.equal((255 * data.pixels.to_pixels(images)).round().byte(), data._test[0])
    assert torch.allclose(data.pixels.to_input(data._test[0] / 255), images, atol=1e-5)

    data = textures(CPU)
    images, _ = next(data.test_batches(900, 0, 1))
    pixels = data.pixels.to_pixels(images)
    assert (pixels.amin((1, 2, 3)) == 0).all() and (pixels.amax((1, 2, 3)) == 1).all()
    assert torch.allclose(data.pixels.to_input(pixels), images, atol=1e-4)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_on_a_linear_network_is_the_worst_case(name):
    """Of two classes, the loss softplus(z_other - z_label) grows with every pixel in which w_other > w_label, and falls with every other."""
    network, epsilon = linear(64, 2), 0.1
    images, labels = first_digits(50)
    labels = labels % 2
    weight = network[1].weight.detach()
    uphill = (weight[1 - labels] - weight[labels]).view(images.shape)
    reach = epsilon * 16 / 6.017
    worst = torch.where(uphill > 0, (images + reach).clamp(max=WHITE), (images - reach).clamp(min=BLACK))
    found = attacked(network, images, labels, range(50), Attack(name, epsilon), digits(CPU).pixels)
    assert torch.allclose(found, worst, atol=1e-5)


def test_unbounded_images_lose_epsilon_times_the_weights_norm():
    network, epsilon = linear(1024, 2), 8 / 255
    data = textures(CPU)
    images, labels = next(data.test_batches(20, 0, 1))
    labels = labels % 2
    found = attacked(network, images, labels, range(20), Attack("fgsm", epsilon), data.pixels)
    weight = network[1].weight.detach()
    loss = (weight[1 - labels] - weight[labels]).abs().sum(1) * epsilon * 11.7

    def margin(these):
        logits = network(these).detach().gather(1, torch.stack([labels, 1 - labels], 1))
        return logits[:, 0] - logits[:, 1]

    assert torch.allclose(margin(images) - margin(found), loss, rtol=1e-3)


@pytest.mark.parametrize(
    "attack", [Attack("fgsm", 0.3), Attack("pgd", 0.3), Attack("pgd", 0.05, steps=3, step_size=0.5), Attack("pgd", 0.2, steps=1)]
)
def test_attacks_stay_in_the_ball_and_in_the_pixel_range(attack):
    network = build(tiny(), seed=0).eval()
    images, labels = first_digits(40)
    found = attacked(network, images, labels, range(40), attack, digits(CPU).pixels)
    assert (found - images).abs().max() <= attack.epsilon * 16 / 6.017 + 1e-5
    assert found.min() >= BLACK - 1e-5 and found.max() <= WHITE + 1e-5
    assert not torch.equal(found, images) and not found.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_each_channel_moves_by_its_own_scale():
    network = linear(3072, 10)
    data = bytes_like_cifar()
    images, labels = next(data.test_batches(40, 0, 1))
    found = attacked(network, images, labels, range(40), Attack("fgsm", 8 / 255), data.pixels)
    moved = (found - images).abs().amax((0, 2, 3))
    assert torch.allclose(moved, 8 / 255 / torch.tensor(STD), rtol=1e-4)
    steps = 255 * data.pixels.to_pixels(found) - data._test[0]
    inside = (data._test[0] >= 8) & (data._test[0] <= 247)
    assert torch.allclose(steps[inside].abs(), torch.tensor(8.0), atol=1e-3)


def test_pgd_does_no_worse_than_fgsm():
    network = linear(64, 10)
    images, labels = first_digits(200)
    losses = {
        name: F.cross_entropy(network(attacked(network, images, labels, range(200), Attack(name, 0.1), digits(CPU).pixels)), labels)
        for name in ATTACKS
    }
    assert losses["pgd"] >= losses["fgsm"] > F.cross_entropy(network(images), labels)


def test_pgd_starts_anywhere_but_always_there():
    images, labels = first_digits(10)
    still = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    nn.init.zeros_(still[1].weight)  # no gradient: an attack stays where it starts
    found, again = (attacked(still, images, labels, range(10), Attack("pgd", 0.1), digits(CPU).pixels) for _ in range(2))
    assert torch.equal(found, again)
    one = attacked(still, images[7:8], labels[7:8], [7], Attack("pgd", 0.1), digits(CPU).pixels)
    assert torch.equal(found[7:8], one)
    inside = (images > BLACK + 0.3) & (images < WHITE - 0.3)
    away = (found - images)[inside] / (0.1 * 16 / 6.017)
    assert away.abs().max() <= 1 + 1e-5 and 0.4 < away.abs().mean() < 0.6 and away.unique().numel() > 0.9 * away.numel()


@pytest.mark.parametrize("make", [digits, textures, lambda device: bytes_like_cifar()])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_epsilon_of_nothing_is_the_clean_score(make, name):
    data = make(CPU)
    network = linear(data.info.channels * data.info.image_size**2, data.info.num_classes)
    clean = score(network, data, Evaluation(), Part())
    assert attacked_score(network, data, Attack(name, 0), 250, Part()) == clean
    assert attacked_score(network, data, Attack(name, 0.02), 250, Part()).loss > clean.loss


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [32, 128])
def test_severity_orders_the_damage(name, size):
    pixels = photographs(size)
    distances = [0.0]
    for severity in SEVERITIES:
        found = corrupted(pixels, range(len(pixels)), Corruption(name, severity))
        assert found.shape == pixels.shape and found.dtype == pixels.dtype and found.min() >= 0 and found.max() <= 1
        distances.append(float((found - pixels).square().mean()))
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_the_image_and_its_number_alone(name):
    pixels = photographs(32)
    together = corrupted(pixels, range(12), Corruption(name, 3))
    for number in (0, 5, 11):
        assert torch.equal(corrupted(pixels[number : number + 1], [number], Corruption(name, 3))[0], together[number])
    other = corrupted(pixels, range(1, 13), Corruption(name, 3))
    assert torch.equal(other, together) == ("noise" not in name)


@pytest.mark.parametrize("scored", ["gaussian_noise", "impulse_noise", "pgd"])
def test_scores_depend_neither_on_the_batch_nor_on_the_ranks(scored):
    data, network = digits(CPU), linear(64, 10)

    def score_of(batch_size, world):
        if scored == "pgd":
            return attacked_score(network, data, Attack("pgd", 0.05, steps=2, step_size=0.01), batch_size, world)
        return corrupted_score(network, data, Corruption(scored, 4), batch_size, world)

    whole = score_of(250, Part())
    assert whole.images == 360
    by_seven = score_of(7, Part())
    assert by_seven.correct == whole.correct and math.isclose(by_seven.loss, whole.loss, rel_tol=1e-6)
    parts = [score_of(50, Part(rank, 7)) for rank in range(7)]
    assert sum(part.images for part in parts) == 360 and sum(part.correct for part in parts) == whole.correct
    assert math.isclose(sum(part.loss * part.images for part in parts) / 360, whole.loss, rel_tol=1e-6)


def test_contrast_by_hand():
    pixels = torch.tensor([[0.0, 1.0], [0.4, 0.6]]).view(1, 1, 2, 2)
    found = corrupted(pixels, [0], Corruption("contrast", 2))  # half of what it was, around the mean of 0.5
    assert torch.allclose(found, torch.tensor([[0.25, 0.75], [0.45, 0.55]]).view(1, 1, 2, 2))
    colours = torch.stack([torch.full((2, 2), value) for value in (0.1, 0.5, 0.9)])[None]
    assert torch.allclose(corrupted(colours, [0], Corruption("contrast", 5)), colours)  # around each channel's own mean


def test_brightness_by_hand():
    grey = torch.tensor([[0.0, 0.95], [0.5, 0.3]]).view(1, 1, 2, 2)
    assert torch.allclose(
        corrupted(grey, [0], Corruption("brightness", 2)), torch.tensor([[0.1, 1.0], [0.6, 0.4]]).view(1, 1, 2, 2)
    )  # fmt: skip
    # The largest channel, V of HSV, grows by 0.1; the hue and the saturation stay, so all channels grow by one factor.
    colour = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.allclose(corrupted(colour, [0], Corruption("brightness", 2)), colour * 0.7 / 0.6, atol=1e-6)


def test_blur_of_a_dot_by_hand():
    dot = torch.zeros(1, 1, 33, 33)
    dot[0, 0, 16, 16] = 1
    found = corrupted(dot, [0], Corruption("gaussian_blur", 5))[0, 0]
    bell = torch.exp(-(torch.arange(-4, 5.0) ** 2) / 2)  # deviation 1, cut at 4
    bell /= bell.sum()
    assert torch.allclose(found[12:21, 12:21], bell[:, None] * bell, atol=1e-6) and math.isclose(found.sum(), 1, rel_tol=1e-5)


def test_noise_is_of_the_stated_size():
    grey = torch.full((40, 3, 32, 32), 0.5)
    gaussian = corrupted(grey, range(40), Corruption("gaussian_noise", 5)) - grey
    assert abs(gaussian.std() - 0.10) < 0.001 and abs(gaussian.mean()) < 0.001
    impulse = corrupted(grey, range(40), Corruption("impulse_noise", 5))
    assert set(impulse.unique().tolist()) == {0, 0.5, 1}
    assert abs((impulse == 0).float().mean() - 0.035) < 0.002 and abs((impulse == 1).float().mean() - 0.035) < 0.002


def test_pixelate_leaves_fewer_columns():
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    found = corrupted(ramp, [0], Corruption("pixelate", 5))
    assert found[0, 0, 0].unique().numel() == 20  # 0.65 * 32, rounded down
    flat = torch.full((1, 3, 32, 32), 51 / 255)
    assert torch.allclose(corrupted(flat, [0], Corruption("pixelate", 5)), flat)


def test_jpeg_changes_a_photograph_and_no_flat_image():
    pixels = photographs(32)
    change = (corrupted(pixels, range(12), Corruption("jpeg_compression", 1)) - pixels).abs()
    assert (change.amax((1, 2, 3)) > 2 / 255).all() and change.mean() < 0.05
    grey = torch.full((1, 1, 32, 32), 128 / 255)
    assert torch.allclose(corrupted(grey, [0], Corruption("jpeg_compression", 5)), grey)


def test_images_normalised_by_themselves_know_no_contrast():
    data = textures(CPU)
    network = linear(1024, 18)
    clean, contrast, blur = (
        score(network, data, Evaluation(), Part()),
        *(corrupted_score(network, data, Corruption(name, 5), 250, Part()) for name in ("contrast", "gaussian_blur")),
    )
    assert contrast.correct == clean.correct and math.isclose(contrast.loss, clean.loss, rel_tol=1e-4)
    assert not math.isclose(blur.loss, clean.loss, rel_tol=1e-3)


def test_summary_counts_every_corruption_alike():
    scores = {
        Corruption("contrast", 1): Score(10, 10, 0.0),
        Corruption("contrast", 2): Score(5, 10, 0.0),
        Corruption("pixelate", 3): Score(1, 4, 0.0),
    }
    summary = corrupted_accuracy(scores)
    assert summary.by_corruption == {"contrast": 0.75, "pixelate": 0.25} and summary.mean == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attack("deepfool", 0.1),
        lambda: Attack("fgsm", -0.1),
        lambda: Attack("fgsm", 8),
        lambda: Attack("pgd", math.nan),
        lambda: Attack("pgd", 0.1, steps=0),
        lambda: Attack("pgd", 0.1, step_size=math.inf),
        lambda: Corruption("rain", 1),
        lambda: Corruption("contrast", 0),
        lambda: Corruption("contrast", 6),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(LoftError) as told:
        make()
    assert "\n" not in str(told.value) and told.value.usage


# -- test sets on disk -----------------------------------------------------------------------------------------------------


def make_cifar_c(folder, classes=10):
    """Files of the real size, full of holes. Images 20,000 and on, the first of severity 3, are white, then black."""
    images = np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    images[20_000] = (255, 0, 51)
    np.save(folder / "labels.npy", (np.arange(50_000) % classes).astype(np.uint8))


def test_cifar_c_is_the_data_set_with_other_test_images(tmp_path):
    make_cifar_c(tmp_path)
    data = bytes_like_cifar()
    shifted = cifar_c(data, tmp_path, "fog", 3)
    images, labels = next(shifted.test_batches(2, 0, 1))
    colour = (torch.tensor([1, 0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(images[0], colour.view(3, 1, 1).expand(3, 32, 32), atol=1e-5) and labels.tolist() == [0, 1]
    assert torch.allclose(images[1], (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1).expand(3, 32, 32), atol=1e-5)
    first = next(cifar_c(data, tmp_path, "fog", 2).test_batches(1, 0, 1))[0]
    assert torch.equal(first[0], images[1])

    order = Order("replicated", 40, 8, 0, 0, 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(shifted.train_batches(order, 0, 3), data.train_batches(order, 0, 3), strict=True))
    assert shifted.info.test_images == 10_000 and data.info.test_images == 40 and data.info.name == "cifar10"
    assert shifted.info.fingerprint != cifar_c(data, tmp_path, "fog", 2).info.fingerprint
    found = score(linear(3072, 10), shifted, Evaluation(evaluation_batch=2500), Part())
    assert found.images == 10_000 and 900 <= found.correct <= 1100  # nearly all images are alike, and a tenth is of each class


@pytest.mark.parametrize(
    ("open_it", "files", "count"),
    [
        (lambda data, folder: cifar10_1(data, folder), ("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy"), 2000),
        (lambda data, folder: cifar10_1(data, folder, "v4"), ("cifar10.1_v4_data.npy", "cifar10.1_v4_labels.npy"), 2021),
        (lambda data, folder: cifar10_2(data, folder), ("cifar102_test.npz",), 2000),
        (lambda data, folder: cifar10_2(data, folder, "train"), ("cifar102_train.npz",), 10_000),
    ],
)
def test_cifar_gathered_anew_is_read(tmp_path, open_it, files, count):
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[-1] = 255
    labels = (np.arange(count) % 10).astype(np.int32)
    if len(files) == 1:
        # The real ones hold Python objects besides, which nobody must unpickle.
        np.savez(tmp_path / files[0], images=images, labels=labels, label_names=np.array([{}], dtype=object))
    else:
        np.save(tmp_path / files[0], images)
        np.save(tmp_path / files[1], labels)
    batches = list(open_it(bytes_like_cifar(), tmp_path).test_batches(250, 0, 1))
    assert sum(len(found) for _, found in batches) == count
    last, label = batches[-1][0][-1], batches[-1][1][-1]
    assert torch.allclose(last[:, 0, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD), atol=1e-5) and label == (count - 1) % 10
    (tmp_path / files[-1]).unlink()
    with pytest.raises(LoftError, match=r"there is no cifar10\S+ in \S+: name the folder"):
        open_it(bytes_like_cifar(), tmp_path)


def missing_labels(folder):
    (folder / "labels.npy").unlink()


def short_images(folder):
    np.save(folder / "fog.npy", np.zeros((10_000, 32, 32, 3), np.uint8))


def float_images(folder):
    np.lib.format.open_memmap(folder / "fog.npy", "w+", np.float32, (50_000, 32, 32, 3))


def torn_images(folder):
    with open(folder / "fog.npy", "r+b") as file:
        file.truncate(1000)


def archive(folder):
    np.savez(folder / "again.npz", images=np.zeros(3))
    (folder / "again.npz").replace(folder / "fog.npy")


def objects(folder):
    np.save(folder / "labels.npy", np.array([{}] * 50_000, dtype=object))


def no_array(folder):
    (folder / "labels.npy").write_text("cat\n" * 50_000)


def nothing(folder):
    (folder / "labels.npy").write_bytes(b"")


def float_labels(folder):
    np.save(folder / "labels.npy", np.zeros(50_000))


def strange_labels(folder):
    np.save(folder / "labels.npy", (np.arange(50_000) % 11).astype(np.uint8))


def negative_labels(folder):
    np.save(folder / "labels.npy", np.arange(50_000) % 10 - 1)


@pytest.mark.parametrize(
    "spoil",
    [
        missing_labels, short_images, float_images, torn_images, archive, objects, no_array, nothing, float_labels, strange_labels,
        negative_labels,
    ],
)  # fmt: skip
def test_broken_cifar_c_is_one_line_with_its_folder(tmp_path, spoil):
    make_cifar_c(tmp_path)
    spoil(tmp_path)
    with pytest.raises(LoftError) as told:
        cifar_c(bytes_like_cifar(), tmp_path, "fog", 1)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)


def test_broken_archive_is_one_line_with_its_folder(tmp_path):
    path = tmp_path / "cifar102_test.npz"
    np.savez_compressed(path, images=np.zeros((2000, 32, 32, 3), np.uint8), labels=np.arange(2000) % 10)
    whole = path.read_bytes()
    for content in (whole[:500], whole[:100] + b"x" * 200 + whole[300:], b"", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(LoftError, match="cannot be read") as told:
            cifar10_2(bytes_like_cifar(), tmp_path)
        assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(LoftError, match="images"):
        cifar10_2(bytes_like_cifar(), tmp_path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(LoftError, match="cannot be read"):
        cifar10_2(bytes_like_cifar(), tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["labels.npy", "labels"])
def test_an_archive_that_holds_an_array_twice_is_refused(tmp_path, name):
    path, content = tmp_path / "cifar102_test.npz", io.BytesIO()
    np.savez_compressed(path, images=np.zeros((2000, 32, 32, 3), np.uint8), labels=np.arange(2000) % 10)
    np.save(content, np.zeros(2000, int))
    with ZipFile(path, "a") as archive:
        archive.writestr(name, content.getvalue())
    with pytest.raises(LoftError, match="twice"):
        cifar10_2(bytes_like_cifar(), tmp_path)


def test_a_network_of_other_classes_is_not_tested(tmp_path):
    make_cifar_c(tmp_path)
    with pytest.raises(LoftError, match="not all from 0 to 99: name the folder with cifar100's"):
        cifar_c(bytes_like_cifar("cifar100", 100), tmp_path, "fog", 1)
    for open_it in (
        lambda data: cifar_c(data, tmp_path, "fog", 1),
        lambda data: cifar10_1(data, tmp_path),
        lambda d: cifar10_2(d, tmp_path),
    ):
        with pytest.raises(LoftError, match="not for digits"):
            open_it(digits(CPU))
    for usage in (
        lambda data: cifar_c(data, tmp_path, "rain", 1),
        lambda data: cifar_c(data, tmp_path, "fog", 6),
        lambda data: cifar10_1(data, tmp_path, "v5"),
        lambda data: cifar10_2(data, tmp_path, "val"),
    ):
        with pytest.raises(LoftError, match="choose one"):
            usage(bytes_like_cifar())
