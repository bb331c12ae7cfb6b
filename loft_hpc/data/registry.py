"""Data sets by name."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from loft_hpc.comm.world import World
from loft_hpc.data import embedded
from loft_hpc.data.catalogue import CIFAR, DATASET_NAMES, DOWNLOADED, FIXED_SIZE, IMAGE_FOLDERS, MAX_LOADER_WORKERS, SPLITS
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import stem_for

_LABEL_BYTES = 8
MOST_CHOSEN = 8
"""Loader processes that are started unasked."""
IMAGE_SIZE = 224
"""Pixels per side of images on disk, where nobody says another one."""
IMAGE_SIZES = range(8, 1025)


@dataclass(frozen=True)
class DataShape:
    """What a network and its cost depend on of a data set."""

    num_classes: int
    channels: int
    image_size: int
    train_images: int
    test_images: int
    pixel_bytes: int
    """Of one channel of one pixel, as it stays in every rank's memory; 0 for images that are read from files as they are needed."""

    @property
    def resident_bytes(self) -> int:
        """What the images and their labels take of every rank's memory."""
        images = self.train_images + self.test_images
        return images * (self.channels * self.image_size**2 * self.pixel_bytes + _LABEL_BYTES) if self.pixel_bytes else 0

    @property
    def stem(self) -> str:
        return stem_for(self.image_size)


_SHAPES = {
    "digits": DataShape(10, 1, 8, 1437, 360, 4),
    "textures": DataShape(18, 1, 32, 3600, 900, 4),
    "fashion-mnist": DataShape(10, 1, 28, 60_000, 10_000, 1),
    "cifar10": DataShape(10, 3, 32, 50_000, 10_000, 1),
    "cifar100": DataShape(100, 3, 32, 50_000, 10_000, 1),
    "imagenet": DataShape(1000, 3, IMAGE_SIZE, 1_281_167, 50_000, 0),
    "synthetic": DataShape(10, 3, 32, 2000, 500, 4),
}


def known_shape(dataset: str, image_size: int | None = None) -> DataShape:
    """A data set's shape without its files. Raises LoftError for folders, which have none before they are looked at."""
    if dataset not in _SHAPES:
        raise LoftError(f"{dataset} has no shape of its own: give one of {', '.join(_SHAPES)}", usage=True)
    settings = DataSettings(dataset=dataset, image_size=image_size)
    return replace(_SHAPES[dataset], image_size=settings.image_size or _SHAPES[dataset].image_size)


def folder_shape(classes: int, train_images: int, test_images: int, image_size: int | None) -> DataShape:
    """The shape of images on disk, three channels each."""
    return DataShape(classes, 3, image_size or IMAGE_SIZE, train_images, test_images, 0)


@dataclass(frozen=True)
class Reading:
    """How a data set is read this time, where it is not as its settings say."""

    data_dir: str | None = None
    """Folder of the files; nothing is fetched into another one."""
    loader_workers: int | None = None
    """Processes per rank that decode image files."""


AS_SET = Reading()


@dataclass(frozen=True)
class DataSettings:
    """Which data, and where they lie."""

    dataset: str = "digits"
    data_dir: str = "data"
    """Folder that holds the files of fashion-mnist, cifar10, cifar100, imagenet and imagefolder."""
    image_size: int | None = None
    """Height and width in pixels; None for the data set's own. digits, Fashion-MNIST and CIFAR have a fixed one."""
    download: bool = field(default=False, metadata={"ordered": True})
    """Fetch them first. Somebody's run is no order to write into `data_dir`: of settings on disk this one is not read."""
    loader_workers: int | None = None
    """Processes per rank that decode image files (imagenet, imagefolder); None for one less than the rank has cores, at most 8."""
    leave_out: tuple[str, ...] = ()
    """Images that are no part of the data (imagenet, imagefolder), named as in the index: train/CLASS/IMAGE."""

    @property
    def synthetic(self) -> bool:
        """Whether the images are random: an accuracy on them means nothing."""
        return self.dataset == "synthetic"

    @property
    def label(self) -> str:
        """The name as results print it."""
        return "synthetic (random images, no real data)" if self.synthetic else self.dataset

    def read(self, reading: Reading) -> "DataSettings":
        """The same data set, read otherwise."""
        moved = {} if reading.data_dir is None else {"data_dir": reading.data_dir, "download": False}
        workers = {} if reading.loader_workers is None else {"loader_workers": reading.loader_workers}
        return replace(self, **moved, **workers)

    def __post_init__(self):
        if self.dataset not in DATASET_NAMES:
            raise LoftError(f"unknown data set '{self.dataset}': choose one of {', '.join(DATASET_NAMES)}")
        if self.image_size is not None and self.dataset in FIXED_SIZE:
            raise LoftError(f"{self.dataset} images have one size: leave --image-size away", usage=True)
        if self.image_size is not None and self.image_size not in IMAGE_SIZES:
            raise LoftError(f"--image-size {self.image_size} must lie between {IMAGE_SIZES[0]} and {IMAGE_SIZES[-1]}", usage=True)
        if self.dataset == "synthetic" and (self.image_size or 0) > 256:
            raise LoftError("synthetic images have at most 256 pixels per side, for they lie in memory: lower --image-size", usage=True)
        if self.loader_workers is not None and not 0 <= self.loader_workers <= MAX_LOADER_WORKERS:
            raise LoftError(f"--loader-workers {self.loader_workers} must lie between 0 and {MAX_LOADER_WORKERS}", usage=True)
        if "\0" in self.data_dir:
            raise LoftError("--data-dir names no folder: it holds a null byte", usage=True)
        if self.download and self.dataset not in DOWNLOADED:
            raise LoftError(f"--download serves {', '.join(DOWNLOADED)}; {self.dataset} is not fetched", usage=True)
        if self.leave_out and self.dataset not in IMAGE_FOLDERS:
            raise LoftError(f"--leave-out serves {' and '.join(IMAGE_FOLDERS)}: omit it for {self.dataset}", usage=True)
        if not all(name.startswith(tuple(f"{split}/" for split in SPLITS)) for name in self.leave_out):
            raise LoftError("images that are left out are named train/CLASS/IMAGE or val/CLASS/IMAGE")
        # recorded whole, so that a run can be resumed from any folder
        object.__setattr__(self, "data_dir", os.path.abspath(self.data_dir))


def loader_processes(wanted: int | None, world: World) -> int:
    """Processes of a rank that decode image files. Each computes all the time, so more than the cores that are left stand in the way."""
    if wanted is not None:
        return wanted
    return min(MOST_CHOSEN, (world.cores or max(1, len(os.sched_getaffinity(0)) // world.local_size)) - 1)


def open_data(settings: DataSettings, device: torch.device, world: World) -> DataSet:
    """The data set, its images on `device`. Raises LoftError where files are missing or corrupt, naming the folder looked at."""
    folder = Path(settings.data_dir)
    if settings.dataset == "digits":
        return embedded.digits(device)
    if settings.dataset == "textures":
        return embedded.textures(device, settings.image_size or 32)
    if settings.dataset == "synthetic":
        return embedded.synthetic(device, settings.image_size or 32)
    # torchvision takes longer to import than digits take to train on for an epoch
    if settings.dataset in CIFAR:
        from loft_hpc.data.cifar import cifar

        return cifar(settings.dataset, folder, settings.download, device, world)
    if settings.dataset == "fashion-mnist":
        from loft_hpc.data.fashion_mnist import fashion_mnist

        return fashion_mnist(folder, settings.download, device, world)
    from loft_hpc.data.folders import FolderDataSet

    return FolderDataSet(settings, device, world)
