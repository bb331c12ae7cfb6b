"""Images inside uncompressed tars: a million files less for a file server. Nothing is ever unpacked; a member's name is only a name."""

import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torchvision.datasets.folder import IMG_EXTENSIONS

from loft_hpc.data.index import Index, Stamp, stamp
from loft_hpc.errors import LoftError

OPEN_TARS = 64
"""A process keeps at most so many open."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SHARD_IMAGES = ("jpg", "jpeg", "png")

Member = tuple[str, int, int]
"""(name, first byte of its content in the tar, bytes)."""


@dataclass
class Tar:
    """What a tar holds."""

    path: Path
    stamp: Stamp
    images: list[Member] = field(default_factory=list)
    """In the order in which they lie there."""
    others: int = 0
    """Files that are no images."""
    labels: dict[str, bytes] = field(default_factory=dict)
    """The contents of KEY.cls, by KEY."""


def scan(path: Path) -> Tar:
    """List a tar by its headers. Raises LoftError where it is compressed, torn or no tar."""
    tar = Tar(path, stamp(path.stat(), folder=False))
    _refuse_compressed(path)
    try:
        with open(path, "rb", buffering=1 << 16) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                name = member.name.removeprefix("./")
                key, kind = _key(name)
                if name.lower().endswith(IMG_EXTENSIONS):
                    tar.images.append((name, member.offset_data, member.size))
                else:
                    tar.others += 1
                if kind == "cls":
                    tar.labels[key] = archive.extractfile(member).read(32)
            # tarfile takes a header that it cannot read for the end, and so a torn tar for a short one: a whole one ends in zeros.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark, the listing stops at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, EOFError) as problem:
        raise LoftError(f"{path} is torn or no tar ({problem}): fetch it anew") from None
    return tar


def _refuse_compressed(path: Path) -> None:
    with open(path, "rb") as file:
        begin = file.read(8)
    for magic, name in COMPRESSED.items():
        if begin.startswith(magic):
            raise LoftError(f"{path} is compressed ({name}), so single images cannot be read from it: decompress it to a plain .tar")


def _key(name: str) -> tuple[str, str]:
    """WebDataset's division of a name: KEY up to the first dot of the last part, and what comes after."""
    folder, slash, last = name.rpartition("/")
    key, _, kind = last.partition(".")
    return folder + slash + key, kind.lower()


def class_tar(tar: Tar, label: int) -> tuple[list[Member], list[int]]:
    """The images of a tar that is a class, in the order of their names as in a folder, and their labels."""
    if not tar.images:
        raise LoftError(f"{tar.path} holds no images: remove it, or fetch it anew")
    return sorted(tar.images), [label] * len(tar.images)


def shard(tar: Tar) -> tuple[list[Member], list[int]]:
    """The images of a WebDataset shard, as they lie there, and their labels.

    Raises LoftError where an image has no label or a label no image.
    """
    images, labels, unused = [], [], set(tar.labels)
    for member in tar.images:
        key, kind = _key(member[0])
        if kind not in SHARD_IMAGES:
            continue
        if key not in tar.labels:
            raise LoftError(
                f"{tar.path} holds no label {key}.cls for {member[0]}: a shard has KEY.cls beside each image, the tar of a class images alone"
            )
        images.append(member)
        labels.append(_number(tar, key))
        unused.discard(key)
    if unused or not images:
        what = f"the label {min(unused)}.cls without its image" if unused else "no images"
        raise LoftError(f"{tar.path} holds {what}: a shard has KEY.jpg, .jpeg or .png beside KEY.cls (no dot in KEY)")
    return images, labels


def _number(tar: Tar, key: str) -> int:
    text = tar.labels[key].strip()
    if not (text.isdigit() and len(text) < 10):
        shown = text.decode(errors="replace")
        raise LoftError(f"the label {key}.cls in {tar.path} is {shown!r}, not a whole number: write labels as 0, 1, 2, ...")
    return int(text)


class TarReader:
    """Reads images of an index by their number, each tar opened when it is first needed in a process."""

    def __init__(self, folder: Path, index: Index):
        self._folder, self._index = folder, index
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, image: int) -> bytes:
        """The content of an image's file. Raises OSError where the tar cannot be read or is not the one that was listed."""
        source, start, size = self._index.places[image].tolist()
        content = os.pread(self._tar(source).fileno(), size, start)
        if len(content) != size:
            raise OSError(f"the tar holds {len(content)} of its {size} bytes")
        return content

    def _tar(self, source: int) -> BinaryIO:
        if source not in self._open:
            if len(self._open) >= OPEN_TARS:
                self._open.popitem(last=False)[1].close()
            tar = open(self._folder / self._index.sources[source], "rb", buffering=0)  # noqa: SIM115 (stays open)
            if os.fstat(tar.fileno()).st_size != int(self._index.stamps[source, 1]):
                raise OSError(f"{tar.name} is not the tar that was listed when the job began")
            self._open[source] = tar
        self._open.move_to_end(source)
        return self._open[source]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # another process opens its own
