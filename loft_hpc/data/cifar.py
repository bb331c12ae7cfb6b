"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read by torchvision, which verifies its archives' checksums before it opens them."""

from pathlib import Path

import torch
from torchvision import datasets

from loft_hpc.comm.world import World
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import Batch, DataInfo, DataMissing, PixelRange, TensorDataSet, fingerprint, first_line
from loft_hpc.errors import LoftError

READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
# Mean and standard deviation of the training images, per channel.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(name: str, folder: Path, download: bool, device: torch.device, world: World) -> TensorDataSet:
    """50,000 training and 10,000 test images, (3, 32, 32). `folder` holds the unpacked `cifar-10-batches-py` or `cifar-100-python`."""
    reader = READERS[name]
    if download:
        world.on_root(lambda: download_by(reader, folder, reader.filename))
    sources = [_read(name, folder, train=train) for train in (True, False)]
    train, test = (_batch(source) for source in sources)
    mean, std = STATISTICS[name]
    info = DataInfo(
        name=name,
        num_classes=10 if name == "cifar10" else 100,
        channels=3,
        image_size=32,
        stem="cifar",
        train_images=len(train[0]),
        test_images=len(test[0]),
        fingerprint=fingerprint(*train, *test),
        classes=tuple(sources[0].classes),
        mean=mean,
        std=std,
    )
    augmentation = Augmentation(padding=4, flip=True, mean=mean, std=std)
    return TensorDataSet(info, train, test, augmentation, PixelRange.normalised(mean, std), device)


def _read(name: str, folder: Path, train: bool) -> datasets.CIFAR10:
    reader = READERS[name]
    inside = folder / reader.base_folder
    if not inside.is_dir():
        raise DataMissing(
            f"no {name} in {folder} (looked for {inside}): add --download, or unpack {reader.filename} there and name the folder with --data-dir"
        )
    try:
        return reader(folder, train=train)
    except (RuntimeError, OSError, EOFError) as problem:
        raise LoftError(
            f"the {name} files in {inside} are incomplete or corrupt ({first_line(problem)}): delete them and add --download"
        ) from None


def _batch(source: datasets.CIFAR10) -> Batch:
    return torch.from_numpy(source.data).permute(0, 3, 1, 2), torch.tensor(source.targets)


def download_by(reader: type, folder: Path, what: str) -> None:
    """Have one of torchvision's readers fetch its files, and verify them by their checksums. Raises LoftError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reader(folder, download=True)
    except Exception as problem:  # torchvision lets through whatever urllib, tarfile and the file system raise
        raise LoftError(f"{what} could not be downloaded to {folder} ({first_line(problem)}): fetch it where there is a network") from None
