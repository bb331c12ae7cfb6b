"""Writing that never leaves half a file behind, and reading that says in one line what is wrong."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from loft_hpc.errors import LoftError


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
    write_atomically(path, (json.dumps(fields, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises LoftError where it is missing, no JSON, or no object."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise LoftError(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise LoftError(f"{path} cannot be read ({str(problem).splitlines()[0]}): restore it or make the run anew") from None
    if not isinstance(fields, dict):
        raise LoftError(f"{path} holds no JSON object: restore it or make the run anew")
    return fields


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with a SHA-256 over names and contents in its metadata, written atomically."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, to_safetensors(ready, metadata={"sha256": checksum(ready)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote. Raises LoftError where it is missing, torn or altered."""
    if not path.is_file():
        raise LoftError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dictionary; not the mapped file)
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError) as problem:
        raise LoftError(
            f"{path} is truncated or no safetensors file ({str(problem).splitlines()[0]}): restore it or make it anew"
        ) from None
    if expected != checksum(tensors):
        raise LoftError(f"{path} was altered after it was written (its checksum does not fit): restore it or make it anew")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
