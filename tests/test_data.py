"""Data order, augmentation, the embedded data sets, and the readers of files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from loft_hpc.comm.alone import Alone
from loft_hpc.data import cifar as cifar_module
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import calibration_indices
from loft_hpc.data.embedded import TEXTURE_IMAGES, digits, synthetic, textures
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DATASET_NAMES, DataSettings, open_data
from loft_hpc.errors import LoftError

CPU = torch.device("cpu")


# -- order -----------------------------------------------------------------------------------------------------------------


def epoch_of(order: Order, epoch: int) -> list[int]:
    start = epoch * order.steps_per_epoch
    return [index for step in range(start, start + order.steps_per_epoch) for index in order.indices(step).tolist()]


def test_replicated_ranks_walk_all_images_each_in_its_own_order():
    orders = [Order("replicated", 96, 8, 1, rank, 3) for rank in range(3)]
    walks = [epoch_of(order, 2) for order in orders]
    assert all(sorted(walk) == list(range(96)) for walk in walks)
    assert walks[0] != walks[1] != walks[2]
    assert epoch_of(orders[0], 0) != epoch_of(orders[0], 1)


def test_shards_are_disjoint_and_equal():
    walks = [epoch_of(Order("sharded", 100, 4, 1, rank, 3), 1) for rank in range(3)]
    assert [len(walk) for walk in walks] == [32, 32, 32]
    assert len({index for walk in walks for index in walk}) == 96


def test_split_batches_are_those_of_one_rank():
    alone = Order("split", 100, 10, 1, 0, 1)
    parts = [Order("split", 100, 10, 1, rank, 4) for rank in range(4)]
    for step in range(25):
        assert sorted(i for part in parts for i in part.indices(step).tolist()) == sorted(alone.indices(step).tolist())


def test_any_step_can_be_asked_for_first():
    order = Order("replicated", 96, 8, 1, 0, 2)
    later = order.indices(30)
    order.indices(3)
    assert torch.equal(order.indices(30), later)


@pytest.mark.parametrize(
    ("sharing", "batch", "size"), [("replicated", 101, 1), ("sharded", 51, 2), ("split", 3, 4), ("split", 7, 4), ("replicated", 1, 1)]
)
def test_batches_that_cannot_be_filled_are_refused(sharing, batch, size):
    with pytest.raises(LoftError, match="--batch-size"):
        Order(sharing, 100, batch, 0, 0, size)


def test_calibration_batches_are_disjoint_and_fixed():
    batches = calibration_indices(100, 3, 16)
    assert [len(batch) for batch in batches] == [16, 16, 16]
    assert len(torch.cat(batches).unique()) == 48
    assert [len(batch) for batch in calibration_indices(20, 3, 16)] == [16, 4]
    assert [len(batch) for batch in calibration_indices(17, 3, 16)] == [16]  # one image has no variance


# -- augmentation ----------------------------------------------------------------------------------------------------------


def test_crop_and_flip_against_a_loop():
    images = torch.arange(6 * 2 * 5 * 5, dtype=torch.float32).view(6, 2, 5, 5)
    ours = Augmentation(padding=2, flip=True, background=-7).train(images, torch.Generator().manual_seed(3))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(3)
    offsets = torch.randint(5, (2, 6, 1), generator=draw)
    mirrored = torch.rand(6, 1, generator=draw) < 0.5
    assert mirrored.any() and not mirrored.all()
    for number in range(6):
        padded = torch.nn.functional.pad(images[number], (2,) * 4, value=-7)
        top, left = int(offsets[0, number]), int(offsets[1, number])
        expected = padded[:, top : top + 5, left : left + 5]
        # the columns are mirrored, then looked up: a flip of the crop
        assert torch.equal(ours[number], expected.flip(2) if mirrored[number] else expected)


def test_no_augmentation_changes_nothing():
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(Augmentation(padding=0, flip=False).train(images, torch.Generator()), images)


def test_bytes_are_normalised_by_channel():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    augmentation = Augmentation(0, False, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    expected = (images.float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(augmentation.test(images), expected)


# -- embedded --------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    data = digits(CPU)
    assert (data.info.train_images, data.info.test_images, data.info.num_classes) == (1437, 360, 10)
    images = torch.cat([data._train[0], data._test[0]])
    assert images.shape == (1797, 1, 8, 8)
    theirs = sorted(map(tuple, load_digits().data))
    ours = sorted(map(tuple, (images * 6.017 + 4.884).round().flatten(1).double().numpy()))
    assert np.array_equal(ours, theirs)
    assert not data._augmentation.flip


def test_digits_batches_repeat_and_differ_between_ranks():
    data = digits(CPU)
    orders = [Order("replicated", 1437, 32, 7, rank, 2) for rank in range(2)]
    first, again, other = (next(iter(data.train_batches(order, 5, 1))) for order in (orders[0], orders[0], orders[1]))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("size", [16, 32])
def test_textures(size):
    data = textures(CPU, size)
    assert (data.info.num_classes, data.info.train_images, data.info.test_images) == (len(TEXTURE_IMAGES), 3600, 900)
    train, labels = data._train
    assert train.shape == (3600, 1, size, size)
    assert torch.bincount(labels).tolist() == [200] * 18
    torch.testing.assert_close(train.mean((1, 2, 3)), torch.zeros(3600), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std((1, 2, 3), correction=0), torch.ones(3600), atol=1e-3, rtol=0)
    assert data.info.fingerprint == textures(CPU, size).info.fingerprint


def test_texture_halves_do_not_meet():
    """A training patch, found again in its image, lies in the left half; a test patch in the right."""
    import skimage.data

    grey = np.asarray(Image.open(Path(skimage.data.__file__).parent / "camera.png").convert("L"), dtype=np.float32)
    data, middle = textures(CPU, 16), grey.shape[1] // 2
    windows = np.lib.stride_tricks.sliding_window_view(grey, (16, 16))
    place = TEXTURE_IMAGES.index("camera.png")
    for (images, labels), left in ((data._train, True), (data._test, False)):
        patch = images[labels == place][0, 0].numpy()
        # candidates agree in two pixels up to the patch's own scale; the normalised window decides
        mean, std = windows.mean((2, 3)), windows.std((2, 3))
        error = np.abs((windows[:, :, 0, 0] - mean) - patch[0, 0] * std) + np.abs((windows[:, :, 9, 9] - mean) - patch[9, 9] * std)
        for top, start in zip(*np.nonzero(error < 1e-2), strict=True):
            window = windows[top, start]
            if np.allclose((window - window.mean()) / max(window.std(), 1e-6), patch, atol=1e-3):
                assert (start + 16 <= middle) if left else (start >= middle)
                break
        else:
            pytest.fail("the patch is not in its image")


def test_textures_too_large_for_an_image_are_refused():
    with pytest.raises(LoftError, match="--image-size"):
        textures(CPU, 128 + 64)


def test_synthetic_images_say_so():
    assert synthetic(CPU, 16).info.synthetic
    assert "no real data" in DataSettings("synthetic").label
    assert not digits(CPU).info.synthetic


# -- settings and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"dataset": "mnist"}, {"dataset": "digits", "image_size": 16}, {"dataset": "digits", "download": True}])
def test_contradictory_settings_are_refused(fields):
    with pytest.raises(LoftError):
        DataSettings(**fields)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "imagenet", "imagefolder"])
def test_missing_files_name_the_folder_and_the_way_to_get_them(name, tmp_path):
    assert name in DATASET_NAMES
    with pytest.raises(LoftError) as told:
        open_data(DataSettings(name, str(tmp_path)), CPU, Alone())
    assert str(tmp_path) in str(told.value) and "--data-dir" in str(told.value)
    assert "\n" not in str(told.value)


def make_cifar10(folder: Path, monkeypatch) -> np.ndarray:
    """A small CIFAR-10 in the archive's own format, with torchvision's checksums set to it."""
    import hashlib

    base = folder / "cifar-10-batches-py"
    base.mkdir()
    draw, checksums, all_pixels = np.random.default_rng(0), {}, []

    def write(name, fields):
        (base / name).write_bytes(pickle.dumps(fields, protocol=2))
        checksums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()

    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
        all_pixels.append(pixels)
        write(name, {"data": pixels, "labels": [int(label) for label in draw.integers(0, 10, 20)]})
    write("batches.meta", {"label_names": [str(number) for number in range(10)]})
    reader = cifar_module.READERS["cifar10"]
    monkeypatch.setattr(reader, "train_list", [[f"data_batch_{number}", checksums[f"data_batch_{number}"]] for number in range(1, 6)])
    monkeypatch.setattr(reader, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(reader, "meta", {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]})
    return np.concatenate(all_pixels[:5])


def test_cifar_is_read(tmp_path, monkeypatch):
    pixels = make_cifar10(tmp_path, monkeypatch)
    data = open_data(DataSettings("cifar10", str(tmp_path)), CPU, Alone())
    assert (data.info.train_images, data.info.test_images, data.info.channels, data.info.stem) == (100, 20, 3, "cifar")
    assert np.array_equal(data._train[0].numpy().reshape(100, -1), pixels)
    images, labels = next(iter(data.train_batches(Order("replicated", 100, 8, 0, 0, 1), 0, 1)))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_corrupt_cifar_is_one_line(tmp_path, monkeypatch):
    make_cifar10(tmp_path, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"x")
    with pytest.raises(LoftError, match="incomplete or corrupt") as told:
        open_data(DataSettings("cifar10", str(tmp_path)), CPU, Alone())
    assert "\n" not in str(told.value)


def make_folder(root: Path, classes=("cat", "dog"), count=6) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder(tmp_path, workers):
    data = open_data(DataSettings("imagefolder", str(make_folder(tmp_path)), image_size=32, loader_workers=workers), CPU, Alone())
    assert (data.info.num_classes, data.info.train_images, data.info.stem) == (2, 12, "cifar")
    order = Order("replicated", 12, 4, 0, 0, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = list(data.train_batches(order, 0, 3))
    assert torch.equal(torch.get_rng_state(), before) or workers
    later = next(iter(data.train_batches(order, 2, 1)))
    assert torch.equal(later[0], batches[2][0]) and torch.equal(later[1], batches[2][1])  # any step, the same crop
    assert batches[0][0].shape == (4, 3, 32, 32)
    assert sum(len(labels) for rank in range(2) for _, labels in data.test_batches(5, rank, 2)) == 12


def test_unreadable_image_is_one_line(tmp_path):
    make_folder(tmp_path)
    torn = tmp_path / "train" / "cat" / "0.png"
    torn.write_bytes(torn.read_bytes()[:100])
    data = open_data(DataSettings("imagefolder", str(tmp_path), image_size=32, loader_workers=0), CPU, Alone())
    with pytest.raises(LoftError, match=r"0\.png cannot be read") as told:
        list(data.train_batches(Order("replicated", 12, 12, 0, 0, 1), 0, 1))
    assert "\n" not in str(told.value)


def test_folders_of_different_classes_are_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "bird" / "0.png")
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "hen")
    with pytest.raises(LoftError, match=r"different classes \(\S*/train alone has bird, cat; \S*/val alone has hen\): give both the same"):
        open_data(DataSettings("imagefolder", str(tmp_path)), CPU, Alone())


def test_digits_are_those_that_scikit_learn_gives():
    from sklearn.datasets import load_digits

    from loft_hpc.data.embedded import _digits_table

    source, table = load_digits(), _digits_table()
    assert (table[:, :-1].reshape(-1, 8, 8) == source.images).all() and (table[:, -1] == source.target).all()
