"""Fashion-MNIST (Xiao et al., 1708.07747): 70,000 grey photographs of clothes, read from IDX files, packed by gzip or not."""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from loft_hpc.comm.world import World
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.cifar import download_by
from loft_hpc.data.dataset import Batch, DataInfo, DataMissing, PixelRange, TensorDataSet, fingerprint, first_line
from loft_hpc.errors import LoftError
from loft_hpc.files import open_plain

MEAN, STD = (0.2860,), (0.3530,)
"""Of the training images."""

GZIP = b"\x1f\x8b"
ADVICE = "delete it, and fetch it anew (--download, or Debian's package dataset-fashion-mnist)"


@dataclass(frozen=True)
class Idx:
    """An IDX file of bytes: a magic number, the sizes, and the values."""

    name: str
    shape: tuple[int, ...]
    sha256: str
    """Over the unpacked file."""

    @property
    def header(self) -> bytes:
        """Two zeros, 8 for unsigned bytes, the number of dimensions, and each of them with four bytes, the highest first."""
        return bytes((0, 0, 8, len(self.shape))) + b"".join(size.to_bytes(4, "big") for size in self.shape)


FILES = {
    "train": (
        Idx("train-images-idx3-ubyte", (60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        Idx("train-labels-idx1-ubyte", (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ),
    "test": (
        Idx("t10k-images-idx3-ubyte", (10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        Idx("t10k-labels-idx1-ubyte", (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
}  # fmt: skip


def fashion_mnist(folder: Path, download: bool, device: torch.device, world: World) -> TensorDataSet:
    """60,000 training and 10,000 test images, (1, 28, 28), 10 classes. The files lie in `folder` or where torchvision puts them.

    Augmented as CIFAR (crop with 4 pixels of padding, flip), as in Zhong et al., "Random Erasing" (1708.04896): a mirrored shoe is
    a shoe. Raises LoftError where a file is missing, corrupt, or another data set's (MNIST's files have the same names).
    """
    if download:
        world.on_root(lambda: _download(folder))
    home = _home(folder)
    train, test = (_read(home, *files) for files in FILES.values())
    info = DataInfo(
        name="fashion-mnist",
        num_classes=len(datasets.FashionMNIST.classes),
        channels=1,
        image_size=train[0].shape[-1],
        stem="cifar",
        train_images=len(train[0]),
        test_images=len(test[0]),
        fingerprint=fingerprint(*train, *test),
        classes=tuple(datasets.FashionMNIST.classes),
        mean=MEAN,
        std=STD,
    )
    augmentation = Augmentation(padding=4, flip=True, mean=MEAN, std=STD)
    return TensorDataSet(info, train, test, augmentation, PixelRange.normalised(MEAN, STD), device)


def _download(folder: Path) -> None:
    """torchvision takes files that are there for whole ones, so what is there is left to our own reader."""
    try:
        _home(folder)
    except LoftError:
        download_by(datasets.FashionMNIST, folder, "Fashion-MNIST")


def _home(folder: Path) -> Path:
    """The folder that holds all files. Raises LoftError where there is none."""
    names = [file.name for files in FILES.values() for file in files]
    places = [folder, folder / "FashionMNIST" / "raw"]
    lacking = {place: [name for name in names if not _found(place, name)] for place in places}
    best = min(places, key=lambda place: len(lacking[place]))
    if not lacking[best]:
        return best
    if lacking[best] == names:
        raise DataMissing(
            f"no fashion-mnist in {folder} (looked there and in FashionMNIST/raw for {names[0]} and three more, packed by gzip or not): "
            "add --download, or name the folder that holds them with --data-dir (/usr/share/datasets/fashion-mnist of Debian's package "
            "dataset-fashion-mnist)"
        )
    raise LoftError(f"{best} lacks {', '.join(lacking[best])} of fashion-mnist: put it there, or add --download")


def _found(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _read(home: Path, images: Idx, labels: Idx) -> Batch:
    pixels, classes = (_values(_found(home, file.name) or home / file.name, file) for file in (images, labels))
    return torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(classes.astype(np.int64))


def _values(path: Path, file: Idx) -> np.ndarray:
    """What an IDX file holds, uint8. Raises LoftError where it is anything else than `file`; reads no more than that has."""
    size = len(file.header) + math.prod(file.shape)
    try:
        with open_plain(path) as packed:
            is_packed = packed.read(len(GZIP)) == GZIP
            packed.seek(0)
            content = (gzip.GzipFile(fileobj=packed) if is_packed else packed).read(size + 1)
    except (OSError, EOFError, zlib.error) as problem:
        raise LoftError(f"{path} cannot be read ({getattr(problem, 'strerror', None) or first_line(problem)}): {ADVICE}") from None
    if content[:4] != file.header[:4]:
        raise LoftError(f"{path} is no IDX file of {len(file.shape)} dimensions (it begins with {content[:4].hex()}): {ADVICE}")
    sizes = tuple(int.from_bytes(content[place : place + 4], "big") for place in range(4, len(file.header), 4))
    if sizes != file.shape:
        raise LoftError(f"{path} holds {_product(sizes)} values, not Fashion-MNIST's {_product(file.shape)}: {ADVICE}")
    if len(content) != size:
        raise LoftError(f"{path} is {'longer' if len(content) > size else 'shorter'} than its header says: {ADVICE}")
    values = np.frombuffer(bytearray(content), dtype=np.uint8, offset=len(file.header)).reshape(file.shape)
    if len(file.shape) == 1 and values.max() >= len(datasets.FashionMNIST.classes):
        raise LoftError(f"{path} holds the label {values.max()}, and labels end at {len(datasets.FashionMNIST.classes) - 1}: {ADVICE}")
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise LoftError(f"{path} is corrupt, or of another data set with files of that name (its SHA-256 is another): {ADVICE}")
    return values


def _product(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
