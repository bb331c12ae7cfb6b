"""Lists a split of an image data set: a folder for each class, in torchvision's order, or tars (data/tars.py)."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from loft_hpc.data.index import Index, Names, Stamp, stamp
from loft_hpc.data.tars import class_tar, scan, shard
from loft_hpc.errors import LoftError

THREADS = 16
"""Folders or tars that are listed at once: a file server takes its time to answer."""

ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def list_split(folder: Path, split: str) -> Index:
    """The index of `folder`/`split`. Raises LoftError where that is no folder of classes and no folder of whole, uncompressed tars."""
    root = folder / split
    try:
        before = stamp(root.stat(), folder=True)
        with os.scandir(root) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found)
        classes = [name for name, is_folder in entries if is_folder]
        archives = [name for name, is_folder in entries if not is_folder and ARCHIVE.search(name)]
        if classes and archives:
            raise LoftError(f"{root} holds folders ({classes[0]}) and tars ({archives[0]}): keep one of the two for all classes")
        return _of_tars(root, before, archives) if archives else _of_folders(root, before, classes)
    except OSError as problem:
        raise LoftError(f"{root} cannot be listed ({problem.strerror}: {problem.filename}): mend its permissions or restore it") from None


@dataclass(frozen=True)
class _Folder:
    name: str
    """Relative to the split."""
    stamp: Stamp
    files: list[str]
    """Its images, sorted."""


def _of_folders(root: Path, before: Stamp, classes: list[str]) -> Index:
    """As torchvision's ImageFolder: the same classes, labels and order."""
    with ThreadPoolExecutor(THREADS) as pool:
        trees = list(pool.map(lambda name: sorted(_walk(root, name), key=lambda below: below.name), classes))
    counts = [sum(len(below.files) for below in tree) for tree in trees]
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty or not classes:
        which = f"no image in {empty[0]}" if empty else "no folders"
        raise LoftError(f"{root} holds no readable classes ({which}): one folder of images, or one tar, for each class")
    folders = [below for tree in trees for below in tree]
    return Index(
        names=Names.of(f"{root.name}/{below.name}/{file}" for below in folders for file in below.files),
        labels=torch.arange(len(classes), dtype=torch.int32).repeat_interleave(torch.tensor(counts)),
        classes=Names.of(classes),
        sources=Names.of([root.name, *(f"{root.name}/{below.name}" for below in folders)]),
        stamps=torch.tensor([before, *(below.stamp for below in folders)]),
        places=torch.empty(0, 3, dtype=torch.int64),
    )


def _walk(root: Path, name: str) -> Iterable[_Folder]:
    """A folder of images and all folders in it."""
    path = root / name
    before = stamp(path.stat(), folder=True)
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    yield _Folder(name, before, sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS)))
    for below in folders:
        yield from _walk(root, f"{name}/{below}")


def _of_tars(root: Path, before: Stamp, archives: list[str]) -> Index:
    """WebDataset shards where tars hold more than images; where they hold images alone, each is a class with the tar's name."""
    archives.sort(key=_stem)
    with ThreadPoolExecutor(THREADS) as pool:
        tars = list(pool.map(lambda name: scan(root / name), archives))
    if any(tar.others for tar in tars):
        labelled, classes = [shard(tar) for tar in tars], []
    else:
        labelled, classes = [class_tar(tar, label) for label, tar in enumerate(tars)], [_stem(name) for name in archives]
    names = (f"{root.name}/{_stem(name)}/{image}" for name, (images, _) in zip(archives, labelled, strict=True) for image, _, _ in images)
    places = [(number, start, size) for number, (images, _) in enumerate(labelled, start=1) for _, start, size in images]
    return Index(
        names=Names.of(names),
        labels=torch.tensor([label for _, labels in labelled for label in labels], dtype=torch.int32),
        classes=Names.of(classes),
        sources=Names.of([root.name, *(f"{root.name}/{name}" for name in archives)]),
        stamps=torch.tensor([before, *(tar.stamp for tar in tars)]),
        places=torch.tensor(places),
    )


def _stem(archive: str) -> str:
    return archive.rpartition(".")[0]
