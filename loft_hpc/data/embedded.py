"""The data sets that need no download: real images that travel inside scikit-learn's and scikit-image's packages."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import Batch, DataInfo, PixelRange, TensorDataSet, fingerprint
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import stem_for

DIGITS_TEST_IMAGES = 360
_NUMBERS = tuple("0123456789")

TEXTURE_IMAGES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
TEXTURE_TRAIN_PATCHES = 200
TEXTURE_TEST_PATCHES = 50
BY_ITSELF = PixelRange(unit=(11.7,), low=None)
"""Of patches normalised one by one. The unit is 255 grey levels over the standard deviation of the median test patch of 32x32, 21.8 levels:
an epsilon is right for that patch, and as large a part of the contrast of every other."""


def digits(device: torch.device) -> TensorDataSet:
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998), (1, 8, 8), 10 classes: 1,437 train, 360 test.

    The split is a fixed permutation. Pixels of 0 to 16 are scaled to mean 0 and standard deviation 1 over the whole set.
    """
    source = _digits_table()
    source = source[np.random.RandomState(0).permutation(len(source))]
    images = torch.from_numpy(source[:, :-1]).float().view(-1, 1, 8, 8)
    mean, deviation = 4.884, 6.017
    images = (images - mean) / deviation
    labels = torch.from_numpy(source[:, -1]).long()
    train = images[:-DIGITS_TEST_IMAGES], labels[:-DIGITS_TEST_IMAGES]
    test = images[-DIGITS_TEST_IMAGES:], labels[-DIGITS_TEST_IMAGES:]
    # Handwriting mirrored is no digit, so no flip; one pixel of an 8x8 image is a shift as large as 4 of 32.
    augmentation = Augmentation(padding=1, flip=False, background=-mean / deviation)
    return _in_memory("digits", _NUMBERS, train, test, augmentation, PixelRange.normalised((mean / 16,), (deviation / 16,)), device)


def _digits_table() -> np.ndarray:
    """(1797, 65) pixels and label, from scikit-learn's own file: to import scikit-learn for it takes every rank more than a second."""
    package = find_spec("sklearn")
    try:
        if package is None or package.origin is None:
            raise OSError("it is not installed")
        with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
            return np.loadtxt(file, delimiter=",")
    except (OSError, ValueError) as problem:
        raise LoftError(f"scikit-learn's digits cannot be read ({problem}): reinstall scikit-learn") from None


def textures(device: torch.device, size: int = 32) -> TensorDataSet:
    """Patches of the natural images inside scikit-image's package, one class for each image: (1, size, size), 18 classes.

    Training patches are cut from the left halves, test patches from the right halves, at places drawn by a fixed seed; each is
    grey and normalised by itself. 200 training and 50 test patches a class.
    """
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for number, file in enumerate(TEXTURE_IMAGES):
        try:
            grey = np.asarray(Image.open(folder / file).convert("L"), dtype=np.float32)
        except OSError as problem:
            raise LoftError(f"scikit-image's {file} cannot be read ({problem}): reinstall scikit-image") from None
        middle = grey.shape[1] // 2
        if size > min(grey.shape[0], middle):
            raise LoftError(
                f"textures have no patches of {size}x{size} pixels: half of {file} is {grey.shape[0]}x{middle}; lower --image-size"
            )
        draw = np.random.RandomState(seeds.derive(size, "textures", number) % 2**32)
        parts["train"].append(_patches(grey[:, :middle], size, TEXTURE_TRAIN_PATCHES, draw))
        parts["test"].append(_patches(grey[:, middle:], size, TEXTURE_TEST_PATCHES, draw))
    train, test = ((torch.cat(patches), torch.arange(len(patches)).repeat_interleave(len(patches[0]))) for patches in parts.values())
    classes = tuple(file.rpartition(".")[0] for file in TEXTURE_IMAGES)
    return _in_memory("textures", classes, train, test, Augmentation(padding=size // 8, flip=True), BY_ITSELF, device)


def _patches(image: np.ndarray, size: int, count: int, draw: np.random.RandomState) -> Tensor:
    """(count, 1, size, size) patches at random places of a grey image, each with mean 0 and standard deviation 1.

    Patches without any contrast (the black rim of a fundus photograph, an empty margin) say nothing and are drawn again.
    """
    found = []
    while len(found) < count:
        top, left = draw.randint(image.shape[0] - size + 1), draw.randint(image.shape[1] - size + 1)
        patch = image[top : top + size, left : left + size]
        if patch.std() >= 2:
            found.append((patch - patch.mean()) / patch.std())
    return torch.from_numpy(np.stack(found)).unsqueeze(1)


def synthetic(device: torch.device, size: int = 32) -> TensorDataSet:
    """Random images with random labels, (3, size, size), 10 classes, 2,000 train and 500 test: for benchmarks only."""
    draw = seeds.generator(0, "synthetic", size)
    images = torch.randn(2500, 3, size, size, generator=draw)
    labels = torch.randint(10, (2500,), generator=draw)
    return _in_memory(
        "synthetic", _NUMBERS, (images[:2000], labels[:2000]), (images[2000:], labels[2000:]),
        Augmentation(padding=size // 8, flip=True), BY_ITSELF, device, synthetic=True,
    )  # fmt: skip


def _in_memory(
    name: str,
    classes: tuple[str, ...],
    train: Batch,
    test: Batch,
    augmentation: Augmentation,
    pixels: PixelRange,
    device: torch.device,
    synthetic: bool = False,
) -> TensorDataSet:
    size = train[0].shape[-1]
    info = DataInfo(
        name=name,
        num_classes=len(classes),
        channels=train[0].shape[1],
        image_size=size,
        stem=stem_for(size),
        train_images=len(train[0]),
        test_images=len(test[0]),
        fingerprint=fingerprint(*train, *test),
        synthetic=synthetic,
        classes=classes,
        **pixels.mean_and_std,
    )
    return TensorDataSet(info, train, test, augmentation, pixels, device)
