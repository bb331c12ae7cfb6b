"""Lists a split of an image data set: a folder for each class, in torchvision's order, or tars (data/tars.py)."""

import errno
import itertools
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loft_hpc.data.index import Index, Names, Stamp, stamp
from loft_hpc.data.naming import is_hidden, is_image
from loft_hpc.data.tars import class_tar, scan, shard
from loft_hpc.errors import LoftError

THREADS = 16
"""Folders or tars that are listed at once: a file server takes its time to answer."""

ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)

ADVICE = {
    errno.ELOOP: "remove that loop of links",
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.EINVAL: "remove it, or put there what its name says",
}


def list_split(folder: Path, split: str) -> Index:
    """The index of `folder`/`split`. Raises LoftError where that is no folder of classes and no folder of whole, uncompressed tars."""
    root = folder / split
    try:
        status = root.stat()
        with os.scandir(root) as found:
            kinds = {entry.name: _kind(entry) for entry in found if not is_hidden(entry.name)}
        classes = sorted(name for name, kind in kinds.items() if kind == "folder")
        archives = sorted(name for name, kind in kinds.items() if kind != "folder" and ARCHIVE.search(name))
        if classes and archives:
            raise LoftError(f"{root} holds folders ({classes[0]}) and tars ({archives[0]}): keep one of the two for all classes")
        before = stamp(status, folder=True)
        return _of_tars(root, before, archives) if archives else _of_folders(root, before, classes)
    except OSError as problem:
        advice = ADVICE.get(problem.errno, "restore it")
        raise LoftError(f"{root} cannot be listed ({problem.strerror}: {problem.filename}): {advice}") from None


def _kind(entry: os.DirEntry) -> str:
    """`folder`, `file`, or what else it is. Raises LoftError for a link to nothing: a folder of images may have stood there."""
    if entry.is_dir():
        return "folder"
    if entry.is_file():  # of what is no link, the folder itself tells: nothing is asked of the file
        return "file"
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise LoftError(f"{entry.path} is a link to nothing: restore what it led to ({os.readlink(entry.path)}), or remove it")
    return "pipe or device"


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


def _walk(root: Path, name: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterable[_Folder]:
    """A folder of images and all folders in it; `above` are those that it lies in, by device and inode.

    Raises LoftError for a link to one of them, which has no end, and for what has an image's name and is no file.
    """
    path = root / name
    status = path.stat()
    if (itself := (status.st_dev, status.st_ino)) in above:
        raise LoftError(f"{path} is a link to a folder that it lies in, so its images have no end: remove it")
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            kind = _kind(entry)
            if kind == "folder":
                folders.append(entry.name)
            elif is_image(entry.name):
                if kind != "file":
                    raise LoftError(f"{entry.path} is a {kind} and no image: remove it")
                files.append(entry.name)
    yield _Folder(name, stamp(status, folder=True), sorted(files))
    for below in folders:
        yield from _walk(root, f"{name}/{below}", above | {itself})


def _of_tars(root: Path, before: Stamp, archives: list[str]) -> Index:
    """WebDataset shards where tars hold more than images; where they hold images alone, each is a class with the tar's name."""
    archives.sort(key=_stem)
    for one, other in itertools.pairwise(archives):
        if _stem(one) == _stem(other):
            raise LoftError(f"{root} holds {one} and {other}, which name one class or shard: rename one, or remove it")
    with ThreadPoolExecutor(THREADS) as pool:
        tars = list(pool.map(lambda name: scan(root / name), archives))
    if any(tar.other for tar in tars):
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
