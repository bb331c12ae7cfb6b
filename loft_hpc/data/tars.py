"""Images inside uncompressed tars: a million files less for a file server. Nothing is ever unpacked; a member's name is only a name."""

import os
import posixpath
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from loft_hpc.data.index import Index, Stamp, stamp
from loft_hpc.data.naming import is_hidden, is_image
from loft_hpc.errors import LoftError
from loft_hpc.files import open_plain

OPEN_TARS = 64
"""A process keeps at most so many open."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SHARD_IMAGES = ("jpg", "jpeg", "png")
LABEL_BYTES = 32
LINKS = 40
"""A chain of links is followed as far as Linux follows it."""

Member = tuple[str, int, int]
"""(name, first byte of its content in the tar, bytes)."""


@dataclass
class Tar:
    """What a tar holds, dot files left out."""

    path: Path
    stamp: Stamp
    images: list[Member] = field(default_factory=list)
    """In the order in which they lie there; a link to an image is one, with the content of that."""
    other: str | None = None
    """The first file that is no image; None where there are images alone."""
    labels: dict[str, bytes] = field(default_factory=dict)
    """The contents of KEY.cls, by KEY."""
    strange: dict[str, str] = field(default_factory=dict)
    """What is neither a file nor a folder nor a link to a file of this tar: by name, in words."""


def scan(path: Path) -> Tar:
    """List a tar by its headers. Raises LoftError where it is compressed, torn or no tar, or holds a name twice."""
    with open_plain(path) as file:
        tar = Tar(path, stamp(os.fstat(file.fileno()), folder=False))
        _refuse_compressed(path, file.read(8))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                entries = _entries(path, archive)
                # tarfile takes a header that it cannot read for the end, and so a torn tar for a short one: a whole one ends in zeros.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end mark, the listing stops at byte {archive.offset:,}")
        except (tarfile.TarError, ValueError, EOFError) as problem:
            raise LoftError(f"{path} is torn or no tar ({problem}): fetch it anew") from None
        for name in entries:
            if not is_hidden(name):
                _take(tar, name, entries, file)
    return tar


@dataclass(frozen=True)
class _Link:
    target: str
    """The name that it leads to."""
    words: str


Entries = dict[str, Member | _Link | str]
"""What stands under a name, folders aside: a file, a link, or in words what is neither."""


def _entries(path: Path, archive: tarfile.TarFile) -> Entries:
    """All members in their order. Raises LoftError where two have one name: whichever was taken might be the wrong one."""
    entries: Entries = {}
    for member in archive:
        if member.isdir():
            continue
        name = posixpath.normpath(member.name).lstrip("/")  # as unpacked
        if name in entries:
            raise LoftError(
                f"{path} holds {name} twice: make the tar anew, with each name once (tar --append adds another of the same name)"
            )
        if member.isfile() and not member.issparse():
            entries[name] = (name, member.offset_data, member.size)
        elif member.islnk():
            entries[name] = _Link(posixpath.normpath(member.linkname).lstrip("/"), f"a hard link to {member.linkname}")
        elif member.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            entries[name] = _Link(target, f"a link to {member.linkname}")
        else:
            entries[name] = "a sparse file" if member.isfile() else "a pipe, a device or something else that is no file"
    return entries


def _file(entries: Entries, name: str) -> Member | None:
    """The file that a name stands for, through as many links as a kernel follows; None where it stands for none."""
    for _ in range(LINKS):
        entry = entries.get(name)
        if not isinstance(entry, _Link):
            return entry if isinstance(entry, tuple) else None
        name = entry.target
    return None


def _take(tar: Tar, name: str, entries: Entries, file: BinaryIO) -> None:
    """Enter what stands under a name into the tar's list. Raises LoftError where a key has two labels."""
    found = _file(entries, name)
    if found is None:
        entry = entries[name]
        tar.strange[name] = f"{entry.words}, which is no file of this tar" if isinstance(entry, _Link) else str(entry)
        return
    _, start, size = found
    if is_image(name):
        tar.images.append((name, start, size))
        return
    tar.other = tar.other or name
    key, kind = _key(name)
    if kind == "cls":
        if key in tar.labels:
            raise LoftError(f"{tar.path} holds two labels for the key {key} (KEY.cls in two ways of writing): keep one")
        tar.labels[key] = os.pread(file.fileno(), min(size, LABEL_BYTES), start)


def _refuse_compressed(path: Path, begin: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if begin.startswith(magic):
            raise LoftError(f"{path} is compressed ({name}), so single images cannot be read from it: decompress it to a plain .tar")


def _key(name: str) -> tuple[str, str]:
    """WebDataset's division of a name: KEY up to the first dot of the last part, and what comes after."""
    folder, slash, last = name.rpartition("/")
    key, _, kind = last.partition(".")
    return folder + slash + key, kind.lower()


def _refuse_strange(tar: Tar, counts: Callable[[str], bool]) -> None:
    """Raises LoftError for the first member of which a run would need the content, and which has none in the tar."""
    for name, words in tar.strange.items():
        if counts(name):
            raise LoftError(f"{tar.path} holds {name}, {words}: make the tar of plain files (tar --dereference --hard-dereference)")


def class_tar(tar: Tar, label: int) -> tuple[list[Member], list[int]]:
    """The images of a tar that is a class, in the order that they have in a folder, and their labels.

    Raises LoftError where there are none, and for links that lead to no file in the tar: in a folder they would lead to images.
    """
    _refuse_strange(tar, lambda name: is_image(name) or "link" in tar.strange[name])
    if not tar.images:
        raise LoftError(f"{tar.path} holds no images: remove it, or fetch it anew")
    return sorted(tar.images, key=lambda member: member[0].rpartition("/")[::2]), [label] * len(tar.images)


def shard(tar: Tar) -> tuple[list[Member], list[int]]:
    """The images of a WebDataset shard, as they lie there, and their labels.

    Raises LoftError where an image has no label or a label no image, and where two images have one key.
    """
    _refuse_strange(tar, lambda name: _key(name)[1] in (*SHARD_IMAGES, "cls"))
    images: dict[str, Member] = {}
    for member in tar.images:
        key, kind = _key(member[0])
        if kind not in SHARD_IMAGES:
            continue
        if key not in tar.labels:
            beside = f", not {tar.other}" if tar.other else ""
            raise LoftError(
                f"{tar.path} holds no label {key}.cls for {member[0]}: a shard has KEY.cls beside each image, "
                f"the tar of a class images alone{beside}"
            )
        if key in images:
            raise LoftError(f"{tar.path} holds two images of the key {key} ({images[key][0]}, {member[0]}): give each a key of its own")
        images[key] = member
    unused = tar.labels.keys() - images.keys()
    if unused or not images:
        what = f"the label {min(unused)}.cls without its image" if unused else "no images"
        raise LoftError(f"{tar.path} holds {what}: a shard has KEY.jpg, .jpeg or .png beside KEY.cls (no dot in KEY)")
    return list(images.values()), [_number(tar, key) for key in images]


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
