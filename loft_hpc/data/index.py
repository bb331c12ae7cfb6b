"""What lies where in a split of an image data set on disk: listed once, kept in a file, and shared by all processes of a rank."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors, write_tensors

RULES = 2
"""Which files count, and in which order: an index made by other rules is made again."""

Stamp = tuple[int, int]
"""(time of the last change in ns, size in bytes) of a file; (time, 0) of a folder. Another stamp, another content."""


@dataclass(frozen=True)
class Names:
    """Many names in two tensors, which a loader's processes share, where a list of strings would be copied into each of them."""

    content: Tensor
    """All names one after the other, (bytes,) uint8."""
    starts: Tensor
    """Where each name begins, and where the last one ends, (names + 1,) int64."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(name) for name in encoded], out=starts[1:])
        return cls(torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)), torch.from_numpy(starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = self.starts[number : number + 2].tolist()
        return os.fsdecode(self.content[start:end].numpy().tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and torch.equal(self.content, other.content) and torch.equal(self.starts, other.starts)


@dataclass(frozen=True)
class Index:
    """The images of a split, in the order in which they are numbered."""

    names: Names
    """Relative to the data folder: train/CLASS/IMAGE. An image in a tar is named as if it were unpacked into a folder of the tar's name."""
    labels: Tensor
    """(images,) int32."""
    classes: Names
    """By label; none where labels come as numbers (WebDataset shards)."""
    sources: Names
    """The split's folder, then the folders or the tars in it: what the index was made from, relative to the data folder."""
    stamps: Tensor
    """Of each source as it was before it was listed, (sources, 2) int64."""
    places: Tensor
    """(source, first byte, bytes) of each image in a tar, (images, 3) int64; (0, 3) where images are files."""

    @property
    def in_tars(self) -> bool:
        return len(self.places) > 0

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, names: Iterable[str]) -> "Index":
        """The same without the images of these names. Raises KeyError, with the first of them, for names that it does not hold."""
        content, starts = self.names.content.numpy().tobytes(), self.names.starts.tolist()
        numbers = {content[start:end]: number for number, (start, end) in enumerate(itertools.pairwise(starts))}
        kept = torch.ones(len(self), dtype=torch.bool)
        for name in names:
            if os.fsencode(name) not in numbers:
                raise KeyError(name)
            kept[numbers[os.fsencode(name)]] = False
        left = Names.of(os.fsdecode(name) for name, keep in zip(numbers, kept.tolist(), strict=True) if keep)
        return replace(self, names=left, labels=self.labels[kept], places=self.places[kept] if self.in_tars else self.places)


def fingerprint_of(splits: Iterable[Index]) -> str:
    """SHA-256 over the images' names."""
    digest = hashlib.sha256()
    for index in splits:
        digest.update(index.names.content.numpy())
    return digest.hexdigest()


def stamp(status: os.stat_result, folder: bool) -> Stamp:
    """The stamp of a file or folder; what a folder takes on disk says nothing."""
    return status.st_mtime_ns, 0 if folder else status.st_size


def index_of(folder: Path, split: str, make: Callable[[Path, str], Index], keep: bool = True) -> Index:
    """The index that is kept of `folder`/`split`, or a new one by `make` where there is none, a broken one, or one of other contents.

    With `keep`, a new one is kept for the next time: in the data folder or, where that is read-only, in the user's
    cache. Where neither can be written, every start lists the images again. Raises what `make` raises.
    """
    kept = [folder / f".loft-index-{split}.safetensors", *_in_cache(folder, split)]
    for path in kept:
        index = _read(path)
        if index is not None and _is_fresh(index, folder):
            return index
    index = make(folder, split)
    for path in kept if keep else ():
        try:
            write_tensors(path, _tensors(index))
            break
        except LoftError:
            continue
    return index


def _in_cache(folder: Path, split: str) -> list[Path]:
    """The file in the user's cache, the same for every way to write the folder's path; none for a user without a home."""
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    try:
        return [Path.home() / ".cache" / "loft-hpc" / f"index-{place}-{split}.safetensors"]
    except RuntimeError:
        return []


def _is_fresh(index: Index, folder: Path) -> bool:
    """Whether everything that the index was made from is still as it was then."""
    try:
        for number, (changed, size) in enumerate(index.stamps.tolist()):
            is_tar = index.in_tars and number > 0
            if stamp(os.stat(folder / index.sources[number]), folder=not is_tar) != (changed, size):
                return False
    except OSError:
        return False
    return True


def _tensors(index: Index) -> dict[str, Tensor]:
    tensors = {"labels": index.labels, "stamps": index.stamps, "places": index.places, "rules": torch.tensor([RULES])}
    for kind in ("names", "classes", "sources"):
        names = getattr(index, kind)
        tensors |= {f"{kind}/content": names.content, f"{kind}/starts": names.starts}
    return tensors


def _read(path: Path) -> Index | None:
    """The index in a file; None where there is none that can be used."""
    try:
        tensors = read_tensors(path)
        names = {kind: Names(tensors[f"{kind}/content"], tensors[f"{kind}/starts"]) for kind in ("names", "classes", "sources")}
        index = Index(**names, labels=tensors["labels"], stamps=tensors["stamps"], places=tensors["places"])
        if tensors["rules"].tolist() != [RULES]:
            return None
    except (LoftError, OSError, KeyError):
        return None
    fits = len(index.names) == len(index.labels) and len(index.sources) == len(index.stamps)
    return index if fits and len(index.places) in (0, len(index.labels)) else None
