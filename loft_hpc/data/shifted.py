"""Test sets beside CIFAR's own, read from a folder: the same classes, but corrupted images or images gathered anew.

Each comes as the data set that the network was trained on with other test images: the normalisation and the training images stay.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from loft_hpc.data.dataset import TensorDataSet, first_line
from loft_hpc.errors import LoftError

CIFAR_C_CORRUPTIONS = (
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur", "gaussian_noise", "glass_blur",
    "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "saturate", "shot_noise", "snow", "spatter", "speckle_noise", "zoom_blur",
)  # fmt: skip
CIFAR_C_SEVERITIES = range(1, 6)
_SEVERITY_IMAGES = 10_000
_CIFAR_10_1_IMAGES = {"v4": 2021, "v6": 2000}
_CIFAR_10_2_IMAGES = {"test": 2000, "train": 10_000}
CIFAR_10_1_VERSIONS = tuple(_CIFAR_10_1_IMAGES)
CIFAR_10_2_PARTS = tuple(_CIFAR_10_2_IMAGES)

BROKEN = (OSError, ValueError, EOFError, LookupError, OverflowError, MemoryError, RuntimeError, BadZipFile, zlib.error)
"""What NumPy raises on files that are torn, encrypted, or no arrays."""


def cifar_c(data: TensorDataSet, folder: Path, corruption: str, severity: int) -> TensorDataSet:
    """CIFAR-10 or CIFAR-100 with the 10,000 test images of CIFAR-10-C or CIFAR-100-C (Hendrycks and Dietterich, 1903.12261) at a severity.

    `folder` holds `CORRUPTION.npy`, severities 1 to 5 one after the other, and `labels.npy`, as unpacked from zenodo.org/records/2535967
    or 3555552. Raises LoftError where a file is missing or holds anything else.
    """
    _refuse_other(data, ("cifar10", "cifar100"), f"CIFAR-C in {folder}")
    if corruption not in CIFAR_C_CORRUPTIONS:
        raise LoftError(f"CIFAR-C has no corruption '{corruption}': choose one of {', '.join(CIFAR_C_CORRUPTIONS)}", usage=True)
    if severity not in CIFAR_C_SEVERITIES:
        raise LoftError(f"CIFAR-C has no severity {severity}: choose one from 1 to 5", usage=True)
    total = _SEVERITY_IMAGES * len(CIFAR_C_SEVERITIES)
    images, labels = _array(folder / f"{corruption}.npy"), _array(folder / "labels.npy")
    _refuse_misshapen(images, labels, total, folder / f"{corruption}.npy")
    here = slice(_SEVERITY_IMAGES * (severity - 1), _SEVERITY_IMAGES * severity)
    return _tested_on(data, f"{data.info.name}-c {corruption} {severity}", images[here], labels[here], folder)


def cifar10_1(data: TensorDataSet, folder: Path, version: str = "v6") -> TensorDataSet:
    """CIFAR-10 with the test images of CIFAR-10.1 (Recht et al., 1806.00451): 2,000 of v6, whose classes are balanced, or 2,021 of v4.

    `folder` holds `cifar10.1_v6_data.npy` and `cifar10.1_v6_labels.npy`, as in github.com/modestyachts/CIFAR-10.1/datasets. Raises
    LoftError where a file is missing or holds anything else.
    """
    _refuse_other(data, ("cifar10",), f"CIFAR-10.1 in {folder}")
    if version not in CIFAR_10_1_VERSIONS:
        raise LoftError(f"CIFAR-10.1 has no version '{version}': choose one of {', '.join(CIFAR_10_1_VERSIONS)}", usage=True)
    path = folder / f"cifar10.1_{version}_data.npy"
    images, labels = _array(path), _array(folder / f"cifar10.1_{version}_labels.npy")
    _refuse_misshapen(images, labels, _CIFAR_10_1_IMAGES[version], path)
    return _tested_on(data, f"cifar10.1 {version}", images, labels, folder)


def cifar10_2(data: TensorDataSet, folder: Path, part: str = "test") -> TensorDataSet:
    """CIFAR-10 with the 2,000 test images of CIFAR-10.2 (Lu et al. 2020), or the 10,000 of its training part, for test images.

    `folder` holds `cifar102_test.npz` or `cifar102_train.npz`, as in github.com/modestyachts/cifar-10.2. Raises LoftError where it is
    missing or holds anything else.
    """
    _refuse_other(data, ("cifar10",), f"CIFAR-10.2 in {folder}")
    if part not in CIFAR_10_2_PARTS:
        raise LoftError(f"CIFAR-10.2 has no part '{part}': choose one of {', '.join(CIFAR_10_2_PARTS)}", usage=True)
    path = folder / f"cifar102_{part}.npz"
    images, labels = (_read(path, lambda file, name=name: file[name]) for name in ("images", "labels"))
    _refuse_misshapen(images, labels, _CIFAR_10_2_IMAGES[part], path)
    return _tested_on(data, f"cifar10.2 {part}", images, labels, folder)


def _array(path: Path) -> np.ndarray:
    """A .npy file, of which what is used comes into memory."""
    return _read(path, lambda file: file, mapped=True)


def _read(path: Path, array_of: Callable, mapped: bool = False) -> np.ndarray:
    if not path.is_file():
        raise LoftError(f"there is no {path.name} in {path.parent}: name the folder that holds it")
    try:
        # Of its 19 arrays CIFAR-C needs a fifth of one at a time. allow_pickle: a file from elsewhere must not run code.
        file = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        if len(names := getattr(file, "files", [])) != len(set(names)):
            raise ValueError("an array stands in it twice")
        array = array_of(file)
    except BROKEN as problem:
        raise LoftError(f"{path} cannot be read ({first_line(problem)}): fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise LoftError(f"{path} holds an archive instead of an array: fetch it again")
    return array


def _refuse_other(data: TensorDataSet, names: tuple[str, ...], what: str) -> None:
    if data.info.name not in names:
        raise LoftError(
            f"{what} tests networks for {' or '.join(names)}, not for {data.info.name}: give a network trained on that", usage=True
        )


def _refuse_misshapen(images: np.ndarray, labels: np.ndarray, count: int, path: Path) -> None:
    if images.shape != (count, 32, 32, 3) or images.dtype != np.uint8:
        raise LoftError(f"{path} holds images {images.shape} of {images.dtype}, not {(count, 32, 32, 3)} of uint8: fetch it again")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise LoftError(f"the labels of {path} are {labels.shape} of {labels.dtype}, not {count} integers: fetch them again")


def _tested_on(data: TensorDataSet, name: str, images: np.ndarray, labels: np.ndarray, folder: Path) -> TensorDataSet:
    """Raises LoftError unless each of the data set's classes, and no other, is among the labels: CIFAR-10-C is no test of CIFAR-100."""
    found, classes = np.unique(labels), data.info.num_classes
    if not np.array_equal(found, np.arange(classes)):
        raise LoftError(
            f"the labels in {folder} are {len(found)} from {found[0]} to {found[-1]}, not all from 0 to {classes - 1}: "
            f"name the folder with {data.info.name}'s"
        )
    stored = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return data.with_test(name, (stored, torch.from_numpy(labels.astype(np.int64))))
