"""Writing that never leaves half a file behind, and reading that says in one line what is wrong."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.jsontext import from_json_text, to_json_text

JSON_BYTES = 32 << 20
"""No JSON file of ours is larger: the ledgers of 10,000 ranks fit. Reading one costs some twenty times its size in memory at worst."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEPTH = 32
"""Nor nested more deeply: what reads, compares and writes them again may recurse."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to disk, and rename it: readers see the old file or the new one, whole.

    Raises LoftError where the file system refuses (full, read-only); what was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as problem:
        raise LoftError(f"{path} cannot be written ({problem.strerror or problem}): free space or name another folder") from None


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a completely written folder its final name."""
    try:
        os.replace(temporary, final)
        _flush_folder(final.parent)
    except OSError as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise LoftError(f"{final} cannot be made ({problem.strerror or problem}): free space or name another folder") from None


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises LoftError where a number is not finite; what was there stays."""
    write_atomically(path, (to_json_text(fields, str(path), indent=2) + "\n").encode())


def open_plain(path: Path) -> BinaryIO:
    """A file for reading. Raises OSError for a pipe, a device or a folder, where reading might wait or go on for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return os.fdopen(handle, "rb")


def read_text(path: Path, limit: int) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises OSError where it cannot be read, ValueError where it is anything else."""
    with open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes")
    return content.decode()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises LoftError where it is missing, no JSON (NaN and infinity are none), or no object."""
    try:
        fields = from_json_text(read_text(path, JSON_BYTES))
        _refuse_deep(fields)
    except FileNotFoundError:
        raise LoftError(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise LoftError(f"{path} cannot be read ({str(problem).splitlines()[0]}): restore it or make the run anew") from None
    if not isinstance(fields, dict):
        raise LoftError(f"{path} holds no JSON object: restore it or make the run anew")
    return fields


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [item for items in inner for item in items]
    if level:
        raise ValueError("nested too deeply")


def refuse_links_outside(folder: Path) -> None:
    """Raises LoftError if a symbolic link below `folder` leads out of it: what is written there would land among somebody's other files.

    The folder itself may be a link.
    """
    home = folder.resolve()
    for place, folders, files in os.walk(home):
        for name in folders + files:
            entry = Path(place, name)
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(home):
                raise LoftError(
                    f"{folder / entry.relative_to(home)} is a link out of {folder}, and nothing is written through it: put there what it points to"
                )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with a SHA-256 over names and contents in its metadata, besides `metadata`, written atomically.

    Raises LoftError where a number is not finite; what was there stays.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if strange := not_finite(ready):
        raise LoftError(f"{path} would hold a {strange} that is not finite: nothing was written")
    write_atomically(path, to_safetensors(ready, metadata={**(metadata or {}), "sha256": checksum(ready)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote. Raises LoftError where it is missing, torn or altered, or not finite."""
    tensors, expected = _tensors_and_checksum(path, "restore it or make it anew")
    if expected != checksum(tensors):
        raise LoftError(f"{path} was altered after it was written (its checksum does not fit): restore it or make it anew")
    if strange := not_finite(tensors):
        raise LoftError(f"{path} holds a {strange} that is not finite: restore it or make it anew")
    return tensors


def read_any_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of anybody's safetensors file, and the SHA-256 of its bytes, as `sha256sum` prints it.

    Raises LoftError where it is missing, larger than half of the memory, or no such file; a checksum of ours is verified where there is one.
    """
    tensors, expected = _tensors_and_checksum(path, "give one that safetensors.torch.save_file wrote")
    if expected not in (None, checksum(tensors)):
        raise LoftError(f"{path} was altered after it was written (its checksum does not fit): restore it or make it anew")
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return tensors, digest.hexdigest()


def _tensors_and_checksum(path: Path, advice: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, and the checksum that its metadata name, if any."""
    if not path.is_file():
        raise LoftError(f"{path} is no file: {advice}" if path.exists() else f"there is no {path}")
    if path.stat().st_size > _memory_bytes() // 2:
        raise LoftError(f"{path} holds more than half of this machine's memory: {advice}")
    try:
        # by its handle: safetensors takes no path whose name is not UTF-8
        with open_plain(path) as plain, safe_open(f"/proc/self/fd/{plain.fileno()}", framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dictionary; not the mapped file)
            return tensors, (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError, AttributeError) as problem:  # AttributeError: a type that this torch does not have
        raise LoftError(f"{path} is truncated or no safetensors file ({str(problem).splitlines()[0]}): {advice}") from None


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of the first tensor that holds NaN or infinity; empty where none does. Only types that networks have are looked into."""
    return next((name for name, tensor in tensors.items() if tensor.dtype in _FLOATS and not tensor.isfinite().all()), "")


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
