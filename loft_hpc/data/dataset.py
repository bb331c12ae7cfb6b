"""What training and evaluation ask of a data set, and the implementation for images that fit in one tensor."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.order import Order

Batch = tuple[Tensor, Tensor]


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

    def to_json(self) -> dict:
        return asdict(self)


class DataSet(ABC):
    """Images in (N, C, H, W), channels last in memory, with int64 labels, on the device where training takes place."""

    info: DataInfo

    @abstractmethod
    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        """`steps` augmented batches of this rank from `first_step` on; the same images and augmentation whenever asked again."""

    @abstractmethod
    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[Tensor]:
        """The labels of `train_batches` alone, for a rank that sees no images."""

    @abstractmethod
    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """This rank's share (batch b goes to rank b % size) of `batches` fixed batches of training images, not augmented."""

    @abstractmethod
    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """This rank's share of the test images; over all ranks every image exactly once."""


class TensorDataSet(DataSet):
    """Images that lie as one tensor on the training device and are augmented in batches."""

    def __init__(self, info: DataInfo, train: Batch, test: Batch, augmentation: Augmentation, device: torch.device):
        self.info = info
        self._augmentation = augmentation
        self._train = self._place(train, device)
        self._test = self._place(test, device)

    @staticmethod
    def _place(images: Batch, device: torch.device) -> Batch:
        return images[0].to(device).contiguous(memory_format=torch.channels_last), images[1].to(device)

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        images, labels = self._train
        for step in range(first_step, first_step + steps):
            batch = order.indices(step).to(images.device)
            draw = seeds.generator(order.seed, "augment", step, order.rank)
            yield self._augmentation.train(images[batch], draw), labels[batch]

    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[Tensor]:
        labels = self._train[1]
        return (labels[order.indices(step).to(labels.device)] for step in range(first_step, first_step + steps))

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        images, labels = self._train
        for batch in calibration_indices(len(images), batches, batch_size)[rank::size]:
            yield self._augmentation.test(images[batch.to(images.device)]), labels[batch.to(images.device)]

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
