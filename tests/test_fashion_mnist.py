"""Fashion-MNIST: IDX files as they should be and as they should not, and the real ones where Debian's package has put them."""

import gzip
import hashlib
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.mnist import read_image_file, read_label_file

from loft_hpc.cli.main import run
from loft_hpc.comm.alone import Alone
from loft_hpc.data import fashion_mnist
from loft_hpc.data.fashion_mnist import FILES, MEAN, STD, Idx
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, known_shape, open_data
from loft_hpc.errors import LoftError

from test_data import CPU

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
COUNTS = {"train": 40, "test": 20}


def opened(folder: Path, **settings):
    return open_data(DataSettings("fashion-mnist", str(folder), **settings), CPU, Alone())


@pytest.fixture
def contents(monkeypatch) -> dict[str, bytes]:
    """The files of a Fashion-MNIST with fewer images, by name; the reader is told that these are the right ones."""
    draw, small, files = np.random.default_rng(0), {}, {}
    for part, count in COUNTS.items():
        expected = []
        for file in FILES[part]:
            known = replace(file, shape=(count, *file.shape[1:]))
            values = draw.integers(0, 256 if len(known.shape) == 3 else 10, known.shape, dtype=np.uint8)
            files[known.name] = known.header + values.tobytes()
            expected.append(replace(known, sha256=hashlib.sha256(files[known.name]).hexdigest()))
        small[part] = tuple(expected)
    monkeypatch.setattr(fashion_mnist, "FILES", small)
    return files


def put(folder: Path, contents: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_it_is_read_as_torchvision_reads_it(tmp_path, contents, packed, inside):
    put(tmp_path / inside, contents, packed)
    data, plain = opened(tmp_path), put(tmp_path / "plain", contents)
    order = Order("replicated", 40, 40, 0, 0, 1)
    images, labels = next(iter(data.test_batches(20, 0, 1)))
    theirs = read_image_file(str(plain / "t10k-images-idx3-ubyte")).float().div(255).sub(MEAN[0]).div(STD[0])
    torch.testing.assert_close(images[:, 0], theirs)
    assert torch.equal(labels, read_label_file(str(plain / "t10k-labels-idx1-ubyte")))
    assert next(iter(data.train_batches(order, 0, 1)))[0].shape == (40, 1, 28, 28)
    assert (data.info.classes[0], data.info.classes[9], data.info.stem) == ("T-shirt/top", "Ankle boot", "cifar")


def test_one_file_may_be_packed_and_another_not(tmp_path, contents):
    half = dict(list(contents.items())[:2])
    put(tmp_path, half)
    put(tmp_path, {name: content for name, content in contents.items() if name not in half}, packed=True)
    assert opened(tmp_path).info.train_images == 40


def idx(name: str) -> Idx:
    return next(file for files in fashion_mnist.FILES.values() for file in files if file.name == name)


def with_sizes(*sizes: int):
    return lambda content, file: replace(file, shape=(*sizes, *file.shape[len(sizes) :])).header + content[len(file.header) :]


FAULTS = {
    "empty": (lambda content, file: b"", "no IDX file"),
    "no IDX": (lambda content, file: b"nonsense" * 100, "no IDX file"),
    "of the other kind": (lambda content, file: bytes((0, 0, 8, 4 - len(file.shape))) + content[4:], "no IDX file"),
    "of floating point": (lambda content, file: bytes((0, 0, 13)) + content[3:], "no IDX file"),
    "of the other byte order": (lambda content, file: content[3::-1] + content[4:], "no IDX file"),
    "one image less": (lambda content, file: with_sizes(file.shape[0] - 1)(content, file), "holds"),
    "of as many as there may be": (lambda content, file: with_sizes(2**32 - 1)(content, file), "holds 4294967295"),
    "header alone": (lambda content, file: content[: len(file.header)], "shorter"),
    "half a header": (lambda content, file: content[: len(file.header) - 2], "shorter|holds"),
    "a byte short": (lambda content, file: content[:-1], "shorter"),
    "a byte long": (lambda content, file: content + b"\0", "longer"),
    "a bit flipped": (lambda content, file: content[:-1] + bytes((content[-1] ^ 1,)), "corrupt, or of another data set"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_not_as_it_should_be_is_one_line(tmp_path, contents, name, fault, packed):
    spoil, words = FAULTS[fault]
    put(tmp_path, contents | {name: spoil(contents[name], idx(name))}, packed)
    with pytest.raises(LoftError, match=words) as told:
        opened(tmp_path)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value) and "delete it" in str(told.value)


def test_labels_beyond_the_classes_are_named(tmp_path, contents):
    name = "train-labels-idx1-ubyte"
    put(tmp_path, contents | {name: contents[name][:-1] + b"\x0a"})
    with pytest.raises(LoftError, match="the label 10, and labels end at 9"):
        opened(tmp_path)


PACKED = {
    "torn": lambda packed: packed[:-100],
    "of the head alone": lambda packed: packed[:10],
    "with a wrong checksum": lambda packed: packed[:-8] + b"abcd" + packed[-4:],
    "with a bit flipped": lambda packed: packed[:200] + bytes((packed[200] ^ 4,)) + packed[201:],
    "of no known block": lambda packed: packed[:10] + b"\xff" + packed[11:],
    "with more behind it": lambda packed: packed + b"more",
}


@pytest.mark.parametrize("fault", PACKED)
def test_a_packed_file_that_is_broken_is_one_line(tmp_path, contents, fault):
    put(tmp_path, contents, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(PACKED[fault](path.read_bytes()))
    with pytest.raises(LoftError, match=r"train-images-idx3-ubyte\.gz") as told:
        opened(tmp_path)
    assert "\n" not in str(told.value)


def test_a_bomb_is_not_unpacked(tmp_path, contents):
    """A gigabyte of zeros, in a megabyte: no more of it comes into memory than the true file has."""
    put(tmp_path, contents, packed=True)
    name = "t10k-images-idx3-ubyte"
    with gzip.open(tmp_path / f"{name}.gz", "wb", compresslevel=1) as file:
        file.write(contents[name])
        for _ in range(256):
            file.write(bytes(4 << 20))
    tracemalloc.start()
    with pytest.raises(LoftError, match="longer than its header says"):
        opened(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 << 20


def test_what_is_no_file_is_refused(tmp_path, contents):
    name = "train-images-idx3-ubyte"
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        folder = put(tmp_path / make.__name__, contents)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(LoftError, match=f"{name} cannot be read"):
            opened(folder)


def test_files_that_are_missing_are_named(tmp_path, contents):
    with pytest.raises(LoftError, match=r"--download.*--data-dir.*dataset-fashion-mnist"):
        opened(tmp_path)
    put(tmp_path / "FashionMNIST" / "raw", contents)
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(LoftError, match=r"raw lacks t10k-labels-idx1-ubyte of fashion-mnist"):
        opened(tmp_path)


def test_what_is_there_is_not_fetched_again(tmp_path, contents, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "download_by", lambda *_: pytest.fail("fetched again"))
    assert opened(put(tmp_path, contents), download=True).info.test_images == 20


def test_a_dry_run_and_the_report_know_its_shape(capsys):
    shape = known_shape("fashion-mnist")
    assert (shape.num_classes, shape.channels, shape.image_size, shape.stem) == (10, 1, 28, "cifar")
    assert shape.resident_bytes == 70_000 * (28 * 28 + 8)
    assert run(["pretrain", "--preset", "fashion-mnist", "--dry-run", "--workers", "4"]) == 0
    assert run(["commcost", "--dataset", "fashion-mnist", "--model", "resnet20", "--workers", "4"]) == 0
    assert "fashion-mnist" in capsys.readouterr().out
    assert run(["pretrain", "--dataset", "fashion-mnist", "--image-size", "32", "--dry-run"]) == 2


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_images(capsys):
    data, shape = opened(DEBIAN), known_shape("fashion-mnist")
    assert (data.info.train_images, data.info.test_images) == (shape.train_images, shape.test_images) == (60_000, 10_000)
    (images, labels) = next(iter(data.train_batches(Order("replicated", 60_000, 60_000, 0, 0, 1), 0, 1)))
    assert torch.bincount(labels).tolist() == [6000] * 10
    plain = torch.cat([batch for batch, _ in data.calibration_batches(60, 1000, 0, 1)])
    assert abs(plain.mean().item()) < 1e-3 and abs(plain.std().item() - 1) < 1e-3
    assert images.shape == (60_000, 1, 28, 28)
    assert run(["doctor", "--data-dir", str(DEBIAN), "--dataset", "fashion-mnist"]) == 0
    assert "10 classes, 60,000 training and 10,000 test images" in capsys.readouterr().out
