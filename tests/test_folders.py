"""Images on disk: the index, tars, and the loader's batches."""

import gzip
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loft_hpc.comm.alone import Alone
from loft_hpc.data import tars
from loft_hpc.data.dataset import Batch
from loft_hpc.data.folders import FolderDataSet
from loft_hpc.data.index import Index, index_of
from loft_hpc.data.listing import list_split
from loft_hpc.data.loader import NORMALISATION, Images
from loft_hpc.data.order import SHARINGS, Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors, write_tensors

from test_data import CPU, make_folder

ORDER = Order("replicated", 12, 4, 0, 0, 1)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def open_folder(folder: Path, workers: int = 0) -> FolderDataSet:
    return open_data(DataSettings("imagefolder", str(folder), image_size=32, loader_workers=workers), CPU, Alone())


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) > 0 and all(
        torch.equal(one, other) for batches in zip(ours, theirs, strict=True) for one, other in zip(*batches, strict=True)
    )


def everything(data: FolderDataSet) -> list[Batch]:
    """An epoch of training, a calibration and a test."""
    return [*data.train_batches(ORDER, 0, 3), *data.calibration_batches(2, 5, 0, 1), *data.test_batches(5, 0, 1)]


# -- the index -------------------------------------------------------------------------------------------------------------


def make_odd_folder(root: Path) -> None:
    """Names whose order or kind is easily taken wrongly, as torchvision accepts them, and dot files, which we leave out."""
    for name in (
        "b/2.png",
        "b/10.JPEG",
        "b/notes.txt",
        "b/x/1.jpg",
        "b/x-y/1.jpg",
        "b/x/z/1.webp",
        "B/ä.Png",
        "a b/.jpg",
        "a b/._1.jpg",
        "a b/_.tiff",
        "b/.ipynb_checkpoints/2.png",
        ".ipynb_checkpoints/2.png",
        "stray.jpg",
    ):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "7.bmp").touch()
    (root / "train" / "linked").symlink_to(root / "elsewhere")


def test_the_index_is_image_folders(tmp_path):
    make_odd_folder(tmp_path)
    theirs, ours = ImageFolder(tmp_path / "train"), list_split(tmp_path, "train")
    shown = [(path, theirs.classes[label]) for path, label in theirs.samples if "/." not in path]
    assert [str(tmp_path / name) for name in ours.names] == [path for path, _ in shown]
    assert [ours.classes[label] for label in ours.labels.tolist()] == [name for _, name in shown]
    assert list(ours.classes) == ["B", "a b", "b", "linked"]


def test_the_fingerprint_is_over_the_names_of_all_images(tmp_path):
    make_folder(tmp_path)
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for path, _ in ImageFolder(tmp_path / split).samples:
            digest.update(str(Path(path).relative_to(tmp_path)).encode())
    assert open_folder(tmp_path).info.fingerprint == digest.hexdigest()


def refuse(folder: Path, split: str) -> Index:
    pytest.fail("the images were listed again")


def listed_anew(folder: Path) -> bool:
    """Whether the index has to be made again; and it is."""
    calls = []
    index_of(folder, "train", lambda folder, split: (calls.append(split), list_split(folder, split))[1])
    return bool(calls)


@pytest.mark.parametrize("change", ["cat/6.png", "cat/deep/9.png", "new/1.png", "-cat/3.png", "-cat/deep/0.png"])
def test_a_file_more_or_less_is_seen(tmp_path, change):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "deep").mkdir()
    (tmp_path / "train" / "cat" / "deep" / "0.png").touch()
    assert listed_anew(tmp_path) and not listed_anew(tmp_path)
    path = tmp_path / "train" / change.removeprefix("-")
    if change.startswith("-"):
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert listed_anew(tmp_path) and not listed_anew(tmp_path)
    assert (f"train/{change}" in list(index_of(tmp_path, "train", refuse).names)) == (not change.startswith("-"))


def test_a_tar_of_other_content_is_seen(tmp_path):
    make_tars(make_folder(tmp_path / "folder"), tmp_path / "tars")
    assert listed_anew(tmp_path / "tars") and not listed_anew(tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "train" / "cat.tar", "a") as tar:
        tar.add(tmp_path / "folder" / "train" / "cat" / "0.png", "7.png")
    assert listed_anew(tmp_path / "tars")
    assert len(index_of(tmp_path / "tars", "train", refuse)) == 13


def test_broken_indices_are_made_again(tmp_path):
    make_folder(tmp_path)
    index, path = index_of(tmp_path, "train", list_split), tmp_path / ".loft-index-train.safetensors"
    whole = path.read_bytes()
    altered = read_tensors(path)
    altered["labels"] = altered["labels"][:-1]
    by_other_rules = {**read_tensors(path), "rules": torch.tensor([1])}
    older = {name: tensor for name, tensor in by_other_rules.items() if name != "rules"}
    for bad in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-1], whole[:-9] + b"x" + whole[-8:], altered, by_other_rules, older):
        if isinstance(bad, dict):
            write_tensors(path, bad)
        else:
            path.write_bytes(bad)
        assert listed_anew(tmp_path)
        assert path.read_bytes() == whole
        assert index_of(tmp_path, "train", refuse).names == index.names


@contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user, whom read-only folders stop."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("home_is_writable", [True, False])
def test_the_index_of_a_read_only_folder_is_kept_at_home(monkeypatch, home_is_writable):
    with tempfile.TemporaryDirectory() as name:
        data, home = make_folder(Path(name) / "data"), Path(name) / "home"
        home.mkdir()
        for folder in (name, data, home):
            os.chmod(folder, 0o777 if folder == home and home_is_writable else 0o555)
        monkeypatch.setenv("HOME", str(home))
        with without_privileges():
            assert listed_anew(data)
            assert listed_anew(data / ".." / "data") == (not home_is_writable)
        assert not list(data.glob(".loft*")) and len(list(home.rglob("index-*-train.safetensors"))) == home_is_writable
        os.chmod(name, 0o755)


def test_a_loader_process_is_sent_no_names(tmp_path):
    make_folder(tmp_path, count=200)
    images = Images(tmp_path, {"train": list_split(tmp_path, "train")}, 32)
    assert len(ForkingPickler.dumps(images)) < 5000


# -- tars ------------------------------------------------------------------------------------------------------------------


def make_tars(folder: Path, root: Path) -> Path:
    """A tar for each class, its members in an order of its own."""
    for path in folder.glob("*/*"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / path.parent.name / f"{path.name}.tar", "w") as tar:
            for file in sorted(path.iterdir(), reverse=True):
                tar.add(file, f"./{file.name}")
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_shards(folder: Path, root: Path) -> Path:
    """Shards of five images, in the folder's order; of every second one the label comes first."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for number, (path, label) in enumerate(ImageFolder(folder / split).samples):
            with tarfile.open(root / split / f"shard-{number // 5:04}.tar", "a") as tar:
                members = [
                    (f"{number:06}.png", Path(path).read_bytes()),
                    (f"{number:06}.cls", b"%d\n" % label),
                    (f"{number:06}.json", b"{}"),
                ]
                for name, content in members if number % 2 else members[::-1]:
                    add(tar, name, content)
    return root


@pytest.mark.parametrize(("layout", "workers"), [(make_tars, 0), (make_shards, 1)])
def test_tars_give_bitwise_the_batches_of_the_folder(tmp_path, layout, workers):
    folder = make_folder(tmp_path / "folder", classes=("a", "a-b", "c"), count=4)
    plain, packed = open_folder(folder), open_folder(layout(folder, tmp_path / "tars"), workers)
    assert (packed.info.num_classes, packed.info.train_images, packed.info.test_images) == (3, 12, 12)
    assert same(everything(packed), everything(plain))
    assert (packed.info.fingerprint == plain.info.fingerprint) == (layout is make_tars)  # a run may go on with the other


def test_the_tar_of_a_class_may_hold_folders_and_long_names(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "cat.tar", "w", format=tarfile.GNU_FORMAT if split == "train" else tarfile.PAX_FORMAT) as tar:
            folder = tarfile.TarInfo("images")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            add(tar, "/etc/../" + "x" * 200 + ".png", content.getvalue())
    data = open_folder(tmp_path)
    assert (data.info.train_images, data.info.num_classes) == (1, 1)
    assert len(list(data.test_batches(5, 0, 1))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".loft-index-train.safetensors",
        ".loft-index-val.safetensors",
        "train",
        "val",
    ]


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def edit_shard(change):
    """Write train/shard-0000.tar anew, its members (name, content) changed by `change`."""

    def edit(root: Path) -> None:
        path = root / "train" / "shard-0000.tar"
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        change(members)
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                add(tar, name, content)

    return edit


SHARD_FAULTS = {
    "torn in a member": (lambda root: truncate(root / "train" / "shard-0000.tar", 5000), "torn"),
    "torn between members": (lambda root: truncate(root / "train" / "shard-0000.tar", 1024), "torn"),
    "no tar": (lambda root: (root / "train" / "shard-0000.tar").write_bytes(b"nonsense" * 1000), "torn or no tar"),
    "empty": (lambda root: truncate(root / "train" / "shard-0000.tar", 0), "torn"),
    "compressed": (
        lambda root: (root / "train" / "shard-0000.tar").write_bytes(gzip.compress((root / "train" / "shard-0000.tar").read_bytes())),
        "compressed (gzip)",
    ),
    "folders beside tars": (lambda root: (root / "train" / "dog").mkdir(), "keep one of the two"),
    "a label missing": (edit_shard(lambda members: members.pop("000002.cls")), "no label 000002.cls"),
    "an image missing": (edit_shard(lambda members: members.pop("000002.png")), "000002.cls without its image"),
    "no number": (edit_shard(lambda members: members.update({"000002.cls": b"cat"})), "'cat', not a whole number"),
    "labels with a gap": (edit_shard(lambda members: members.update({"000002.cls": b"7"})), "no image of"),
    "no images": (edit_shard(lambda members: [members.pop(name) for name in list(members) if "json" not in name]), "holds no images"),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_what_is_wrong_with_tars_is_one_line(tmp_path, fault):
    root = make_shards(make_folder(tmp_path / "folder"), tmp_path / "shards")
    spoil, words = SHARD_FAULTS[fault]
    spoil(root)
    with pytest.raises(LoftError) as told:
        open_folder(root)
    assert words in str(told.value) and str(root / "train") in str(told.value) and "\n" not in str(told.value)


def test_shards_of_more_classes_than_the_other_split_are_refused(tmp_path):
    root = make_shards(make_folder(tmp_path / "folder"), tmp_path / "shards")
    with tarfile.open(root / "val" / "more.tar", "w") as tar:
        add(tar, "1.png", b"")
        add(tar, "1.cls", b"2")
    with pytest.raises(LoftError, match=r"2 classes and .* 3: give both the same"):
        open_folder(root)


def test_few_tars_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_TARS", 2)
    folder = make_folder(tmp_path / "folder", classes=("a", "b", "c", "d", "e"), count=3)
    images = Images(tmp_path / "tars", {"train": list_split(make_tars(folder, tmp_path / "tars"), "train")}, 32)
    for number in [*range(15), *range(14, -1, -3)]:
        assert not isinstance(images[("train", number, None)], str)
        opened = [os.readlink(handle) for handle in Path("/proc/self/fd").iterdir() if handle.exists()]
        assert len([path for path in opened if path.startswith(str(tmp_path))]) <= 2


# -- batches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_parts_of_a_batch_are_read_together(tmp_path, workers):
    """One loader reads them all; each part is what its order says, however often the reading is taken up."""
    make_folder(tmp_path)
    parts = Order("split", 12, 6, 0, 0, 1).in_parts(3)
    expected = [list(open_folder(tmp_path).train_batches(order, 0, 4)) for order in parts]
    data = open_folder(tmp_path, workers)
    found = [*data.train_parts(parts, 0, 1), *data.train_parts(parts, 1, 3)]
    assert all(same([step[part] for step in found], expected[part]) for part in range(3))


def test_the_number_of_workers_changes_no_bit(tmp_path):
    make_folder(tmp_path)
    alone = list(open_folder(tmp_path).train_batches(ORDER, 0, 3))
    for workers in (1, 2):
        data = open_folder(tmp_path, workers)
        assert same(list(data.train_batches(ORDER, 0, 3)), alone)
        assert same(list(data.train_batches(ORDER, 1, 2)), alone[1:3])  # the same workers, asked again


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_in_mid_epoch_gives_the_same_batches(tmp_path, workers):
    make_folder(tmp_path)
    whole = open_folder(tmp_path, workers)
    steps = list(whole.train_batches(ORDER, 0, 2))
    list(whole.test_batches(5, 0, 1))  # an evaluation in between
    steps += list(whole.train_batches(ORDER, 2, 6))
    resumed = open_folder(tmp_path, workers)
    assert same(list(resumed.train_batches(ORDER, 4, 4)), steps[4:])
    for step, (_, labels) in enumerate(steps):
        assert torch.equal(next(iter(whole.train_labels(ORDER, step, 1))), labels)


def test_ranks_and_seeds_augment_differently(tmp_path):
    make_folder(tmp_path)
    data = open_folder(tmp_path)
    images = {}
    for name, order in {"first": Order("split", 12, 12, 0, 0, 2), "seed": Order("split", 12, 12, 1, 0, 2)}.items():
        images[name] = next(iter(data.train_batches(order, 0, 1)))[0]
    assert not torch.equal(images["first"], images["seed"])
    key = ("train", 0, (0, 3, 0, 5))
    ours = data._training._loader.dataset
    assert np.array_equal(ours[key][0], ours[key][0])
    for other in ((1, 3, 0, 5), (0, 4, 0, 5), (0, 3, 1, 5), (0, 3, 0, 6)):
        assert not np.array_equal(ours[key][0], ours[("train", 0, other)][0])


def test_test_images_are_those_of_the_reference_recipe(tmp_path):
    make_folder(tmp_path)
    recipe = [v2.Resize(37, antialias=True), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    theirs = ImageFolder(tmp_path / "val", v2.Compose([*recipe, v2.Normalize(NORMALISATION.mean, NORMALISATION.std)]))
    ours = torch.cat([images for images, _ in open_folder(tmp_path).test_batches(5, 0, 1)])
    torch.testing.assert_close(ours.contiguous(), torch.stack([image for image, _ in theirs]), atol=1e-5, rtol=1e-5)


def make_colours(root: Path, classes: int = 3, count: int = 16) -> None:
    """Images of one colour each, which no crop changes."""
    for split in ("train", "val"):
        for number in range(classes * count):
            path = root / split / str(number % classes) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (number, 0, 0)).save(path)


def colours(batches: Iterator[Batch]) -> list[int]:
    pixels = torch.cat([images[:, 0, 16, 16] for images, _ in batches])
    return (255 * (pixels * NORMALISATION.std[0] + NORMALISATION.mean[0])).round().int().tolist()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_an_epoch_over_the_ranks_is_exact(tmp_path, sharing):
    make_colours(tmp_path)
    data = open_folder(tmp_path)
    seen = []
    for rank in range(3):
        order = Order(sharing, 48, 12 if sharing == "split" else 8, 0, rank, 3)
        for epoch in range(2):
            walk = colours(data.train_batches(order, epoch * order.steps_per_epoch, order.steps_per_epoch))
            assert walk != sorted(walk)
            seen.append((epoch, walk))
    for epoch in range(2):
        walks = [walk for of, walk in seen if of == epoch]
        if sharing == "replicated":
            assert all(sorted(walk) == list(range(48)) for walk in walks)
        else:
            assert sorted(colour for walk in walks for colour in walk) == list(range(48))
    assert sorted(colour for rank in range(3) for colour in colours(data.test_batches(5, rank, 3))) == list(range(48))


FAULTS = {
    "vanished": (None, lambda folder: (folder / "train" / "cat" / "0.png").unlink()),
    "no image": (None, lambda folder: (folder / "train" / "cat" / "0.png").write_bytes(b"nonsense")),
    "a pipe": (None, lambda folder: ((folder / "train" / "cat" / "0.png").unlink(), os.mkfifo(folder / "train" / "cat" / "0.png"))),
    "torn": (None, lambda folder: truncate(folder / "train" / "cat" / "0.png", 900)),
    "tar vanished": (make_tars, lambda folder: (folder / "train" / "cat.tar").unlink()),
    "tar torn": (make_tars, lambda folder: truncate(folder / "train" / "cat.tar", 20_000)),
}


@pytest.mark.parametrize(("fault", "workers"), [*((fault, 0) for fault in FAULTS), ("torn", 1), ("tar torn", 1)])
def test_an_image_lost_after_the_start_is_one_line(tmp_path, fault, workers):
    layout, spoil = FAULTS[fault]
    folder = make_folder(tmp_path / "folder")
    if layout:
        folder = layout(folder, tmp_path / "tars")
    data = open_folder(folder, workers)
    spoil(folder)
    with pytest.raises(LoftError, match=r"train/cat/\d.png cannot be read") as told:
        list(data.train_batches(Order("replicated", 12, 12, 0, 0, 1), 0, 1))
    assert "\n" not in str(told.value)
