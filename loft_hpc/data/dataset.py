"""What training and evaluation ask of a data set, and the implementation for images that fit in one tensor."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.order import Order
from loft_hpc.data.transfer import to_device
from loft_hpc.errors import LoftError

Batch = tuple[Tensor, Tensor]


class DataMissing(LoftError):
    """There is no such data set in the folder, whole or broken."""


def first_line(problem: BaseException) -> str:
    """What an exception of another library says, or its type where it says nothing."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


@dataclass(frozen=True)
class DataInfo:
    """A data set's facts, as they stand in run.json."""

    name: str
    num_classes: int
    channels: int
    image_size: int
    """Height and width of a training image in pixels."""
    stem: str
    """The stem of networks for it: `cifar` for small images, `imagenet` for large ones."""
    train_images: int
    test_images: int
    fingerprint: str
    """SHA-256 over the images (their names, for folders): two runs with the same one saw the same data."""
    synthetic: bool = False
    """Random images for benchmarks: an accuracy on them means nothing."""
    classes: tuple[str, ...] = ()
    """Class names by label; empty where labels come as numbers alone."""
    mean: tuple[float, ...] | None = None
    """Network input is (pixel - `mean`) / `std`, channel by channel, of pixels from 0 (black) to 1 (white); None where each image is
    normalised by itself."""
    std: tuple[float, ...] | None = None

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class PixelRange:
    """Where pixels from 0 (black) to 1 (white) lie in network input: pixel p of channel c is `low[c]` + p * `unit[c]`."""

    unit: tuple[float, ...]
    """What the whole pixel range measures in network input, per channel."""
    low: tuple[float, ...] | None
    """A black pixel in network input, per channel; None where every image was normalised by itself, so that nobody knows."""

    @classmethod
    def normalised(cls, mean: tuple[float, ...], std: tuple[float, ...]) -> "PixelRange":
        """That of network input (pixel - mean) / std, with both given in the unit of pixels."""
        return cls(tuple(1 / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True)))

    @property
    def mean_and_std(self) -> dict[str, tuple[float, ...] | None]:
        """The same as `DataInfo` says it."""
        if self.low is None:
            return {"mean": None, "std": None}
        return {
            "mean": tuple(-low / unit for low, unit in zip(self.low, self.unit, strict=True)),
            "std": tuple(1 / unit for unit in self.unit),
        }

    def step(self, images: Tensor, epsilon: float) -> Tensor:
        """How far `epsilon` of the pixel range reaches in network input such as `images`, (C, 1, 1)."""
        return epsilon * _channels(self.unit, images)

    def ball(self, images: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The lowest and the highest network input within `epsilon` of `images` that are pixels still; each like `images`, (N, C, H, W).

        Images normalised by themselves end nowhere: theirs is the whole ball.
        """
        step = self.step(images, epsilon)
        lowest, highest = images - step, images + step
        if self.low is None:
            return lowest, highest
        black = _channels(self.low, images)
        white = black + self.step(images, 1)
        # A black or white pixel may lie outside by a rounding error: the ball holds its centre all the same.
        return lowest.maximum(black.minimum(images)), highest.minimum(white.maximum(images))

    def to_pixels(self, images: Tensor) -> Tensor:
        """Network input (N, C, H, W) as pixels from 0 to 1. An image normalised by itself is spread from its darkest to its lightest."""
        if self.low is None:
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            return (images - low) / (high - low).clamp_min(_FLAT)
        return ((images - _channels(self.low, images)) / _channels(self.unit, images)).clamp(0, 1)

    def to_input(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) from 0 to 1 as network input: of mean 0 and standard deviation 1 each, where images are normalised by themselves."""
        if self.low is None:
            mean = pixels.mean((1, 2, 3), keepdim=True)
            return (pixels - mean) / pixels.std((1, 2, 3), correction=0, keepdim=True).clamp_min(_FLAT)
        return _channels(self.low, pixels) + pixels * _channels(self.unit, pixels)


_FLAT = 1e-4
"""An image with less contrast has none but rounding errors."""


def _channels(values: tuple[float, ...], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(-1, 1, 1)


class DataSet(ABC):
    """Images in (N, C, H, W), channels last in memory, with int64 labels, on the device where training takes place."""

    info: DataInfo
    pixels: PixelRange

    @abstractmethod
    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        """`steps` augmented batches of this rank from `first_step` on; the same images and augmentation whenever asked again."""

    def train_parts(self, orders: Sequence[Order], first_step: int, steps: int) -> Iterator[Sequence[Batch]]:
        """`steps` batches in parts, one for each order (`Order.in_parts`)."""
        return zip(*(self.train_batches(order, first_step, steps) for order in orders), strict=True)

    @abstractmethod
    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[Tensor]:
        """The labels of `train_batches` alone, for a rank that sees no images."""

    @abstractmethod
    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """This rank's share (batch b goes to rank b % size) of `batches` fixed batches of training images, not augmented."""

    @abstractmethod
    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """This rank's share of the test images, number rank, rank + size, rank + 2 size and so on, in this order."""


class TensorDataSet(DataSet):
    """Images that lie as one tensor on the training device and are augmented in batches."""

    def __init__(self, info: DataInfo, train: Batch, test: Batch, augmentation: Augmentation, pixels: PixelRange, device: torch.device):
        self.info = info
        self.pixels = pixels
        self._augmentation = augmentation
        self._train = self._place(train, device)
        self._test = self._place(test, device)

    @staticmethod
    def _place(images: Batch, device: torch.device) -> Batch:
        return images[0].to(device).contiguous(memory_format=torch.channels_last), images[1].to(device)

    def with_test(self, name: str, test: Batch) -> "TensorDataSet":
        """Under another name: the same training images, and `test` for test images, stored as these are."""
        other = copy(self)
        other._test = self._place(test, self._test[0].device)
        digest = hashlib.sha256(f"{self.info.fingerprint} {fingerprint(*test)}".encode()).hexdigest()
        other.info = replace(self.info, name=name, test_images=len(test[0]), fingerprint=digest)
        return other

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        images, labels = self._train
        for step in range(first_step, first_step + steps):
            batch = to_device(order.indices(step), images.device)
            draw = seeds.generator(order.seed, "augment", step, order.rank)
            yield self._augmentation.train(images[batch], draw), labels[batch]

    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[Tensor]:
        labels = self._train[1]
        return (labels[to_device(order.indices(step), labels.device)] for step in range(first_step, first_step + steps))

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        images, labels = self._train
        for batch in calibration_indices(len(images), batches, batch_size)[rank::size]:
            batch = to_device(batch, images.device)
            yield self._augmentation.test(images[batch]), labels[batch]

    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        images, labels = (tensor[rank::size] for tensor in self._test)
        for batch, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self._augmentation.test(batch), label


def calibration_indices(images: int, batches: int, batch_size: int) -> list[Tensor]:
    """At most `batches` disjoint batches of training images, the same in every run: the statistics belong to the weights alone.

    A last batch of a single image is left out: it has no variance.
    """
    permutation = torch.randperm(images, generator=seeds.generator(0, "calibration"))
    return [batch for batch in permutation[: batches * batch_size].split(batch_size) if len(batch) > 1]


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
