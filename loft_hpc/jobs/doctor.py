"""`loft doctor`: what is installed, what is missing, which data can be read, and what fixes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from loft_hpc.comm import installed
from loft_hpc.data.catalogue import DATASET_NAMES, DOWNLOADED, IMAGE_FOLDERS
from loft_hpc.errors import LoftError

if TYPE_CHECKING:  # torch may be what is missing
    from loft_hpc.data.dataset import DataSet


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """`ok`, `note` (works, but worth knowing), `missing`, or `broken` (data that a training would refuse)."""
    found: str
    mend: str = ""
    """What to do about it; empty where nothing needs doing."""


def examine(data_dir: Path) -> list[Finding]:
    """Everything that training needs, and the data sets that can be read."""
    horovod = installed.horovod()
    return [*_torch(), _torchvision(), *_packages(), *_surroundings(), *_mpi(), _horovod(horovod), *_gpus(horovod), *_data(data_dir)]


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as problem:
        return [Finding("torch", "missing", str(problem), "bin/setup")]
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    cores = len(os.sched_getaffinity(0))
    return [Finding("torch", "ok", f"{torch.__version__}, {built}; this process may use {cores} cores")]


def _torchvision() -> Finding:
    try:
        import torchvision
    except (ImportError, RuntimeError) as problem:  # a torchvision of another release raises RuntimeError
        return Finding("torchvision", "missing", str(problem).splitlines()[0], "bin/setup")
    return Finding("torchvision", "ok", torchvision.__version__)


def _packages() -> list[Finding]:
    """Packages without which some commands end half way: a line for each that is not there."""
    return [
        Finding(name, "missing", "not installed", f"bin/setup, or pip install {name}")
        for name in ("numpy", "scipy", "pillow", "safetensors", "matplotlib")
        if not _has(name)
    ]


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _surroundings() -> list[Finding]:
    """What MPI needs of the environment and the machine beside itself; a line for each that is not as it should be."""
    findings, shared = [], installed.shared_memory_bytes()
    if not installed.home():
        findings.append(Finding("HOME", "missing", "not set: Open MPI does not start", f"export HOME={installed.home_of_user()}"))
    if not installed.writable_temporary_folder():
        remedy = f"export TMPDIR={installed.usable_temporary_folder()}"
        findings.append(Finding("TMPDIR", "missing", "cannot be written to: Open MPI does not start", remedy))
    if shared is None or shared < installed.SHARED_MEMORY_BYTES:
        what = "is not there" if shared is None else f"has {shared >> 20} MiB free"
        remedy = "free it, or in a container: docker run --shm-size=2g, or --loader-workers 0"
        findings.append(Finding("/dev/shm", "note", f"{what}: ranks exchange more slowly, loader processes may die", remedy))
    return findings


def _mpi() -> list[Finding]:
    mpi, launcher = installed.mpi(), installed.launcher()
    findings = []
    if mpi.facts is None:
        findings.append(Finding("MPI", "missing", mpi.problem, "bin/setup, or load the MPI module that it was set up with"))
    elif not mpi.facts["thread_multiple"]:
        findings.append(Finding("MPI", "missing", f"{mpi.facts['library']} without MPI_THREAD_MULTIPLE", "load an MPI built with it"))
    else:
        findings.append(Finding("MPI", "ok", f"{mpi.facts['library']} through mpi4py {mpi.facts['mpi4py']}"))
    if launcher is None:
        findings.append(Finding("mpirun", "missing", "not on the PATH", "source .venv/bin/activate, or load the MPI module"))
    elif launcher.problem:
        findings.append(Finding("mpirun", "missing", f"{launcher.path} {launcher.problem}", launcher.remedy))
    else:
        findings.append(Finding("mpirun", "ok", f"{launcher.version}, {launcher.path}"))
    return findings


def _horovod(horovod: installed.Probe) -> Finding:
    if horovod.facts is None:
        return Finding("Horovod", "missing", horovod.problem, "bin/setup")
    parts = [name.upper() for name in ("mpi", "gloo", "nccl", "cuda") if horovod.facts[name]]
    found = f"{horovod.facts['version']}, built with {', '.join(parts)}"
    if not horovod.facts["mpi"]:
        return Finding("Horovod", "missing", f"{found}, not MPI", "bin/setup")
    return Finding("Horovod", "ok", found)


def _gpus(horovod: installed.Probe) -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = bool(horovod.facts and horovod.facts["nccl"])
    if not count:
        unused = "Horovod was built with it" if nccl else "not built into Horovod"
        return [
            Finding("GPUs", "note", "none that torch sees: training runs on the CPU"),
            Finding("NCCL", "note", f"{unused}; not needed without GPUs"),
        ]
    names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(count)}))
    gpus = Finding("GPUs", "ok", f"{count} ({names})")
    if nccl:
        return [
            gpus,
            Finding("NCCL", "ok", f"up to {count} ranks here exchange on the GPUs; more ranks share them, through pinned host memory"),
        ]
    return [gpus, Finding("NCCL", "note", "not built into Horovod: exchanges go through pinned host memory", "bin/setup --gpu")]


def _data(folder: Path) -> list[Finding]:
    findings = []
    for name, package in (("digits", "scikit-learn"), ("textures", "scikit-image")):
        try:
            findings.append(Finding(name, "ok", f"inside {package} {version(package)}"))
        except PackageNotFoundError:
            findings.append(Finding(name, "missing", f"{package} is not installed", "bin/setup"))
    for name in (*DOWNLOADED, "imagefolder"):
        found = look(name, folder)[0]
        if found.state == "missing":  # no training needs all of them
            how = (
                "for imagenet and imagefolder: --data-dir"
                if name in IMAGE_FOLDERS
                else f"loft pretrain --dataset {name} --download, or --data-dir"
            )
            found = Finding(name, "note", f"not in {folder}", how)
        findings.append(found)
    return findings


def look(dataset: str, folder: Path, leave_out: tuple[str, ...] = ()) -> tuple[Finding, DataSet | None]:
    """Open a data set as a training does, with its index. Raises LoftError, marked as usage, for settings that contradict themselves."""
    if dataset not in DATASET_NAMES:
        raise LoftError(f"unknown data set '{dataset}': choose one of {', '.join(DATASET_NAMES)}", usage=True)
    try:
        import torch

        from loft_hpc.comm.alone import Alone
        from loft_hpc.data.dataset import DataMissing
        from loft_hpc.data.registry import DataSettings, open_data
    except (ImportError, RuntimeError) as problem:  # a torchvision of another release raises RuntimeError
        return Finding(dataset, "missing", str(problem).splitlines()[0], "bin/setup"), None
    settings = DataSettings(dataset, str(folder), loader_workers=0, leave_out=leave_out)
    try:
        data = open_data(settings, torch.device("cpu"), Alone())
    except LoftError as problem:
        return Finding(dataset, "missing" if isinstance(problem, DataMissing) else "broken", str(problem)), None
    except (ImportError, RuntimeError) as problem:
        return Finding(dataset, "missing", str(problem).splitlines()[0], "bin/setup"), None
    info = data.info
    without = f", {len(leave_out):,} left out" if leave_out else ""
    found = f"{info.num_classes:,} classes, {info.train_images:,} training and {info.test_images:,} test images{without}"
    return Finding(dataset, "ok", found), data


def broken_images(data: DataSet, loader_workers: int | None, told: Callable[[int, int, int], None]) -> list[tuple[str, str]]:
    """Decode all images of a data set on disk: the names of those that cannot be read, and why.

    `told` hears how many are done, of how many, and how many of them are broken.
    """
    from loft_hpc.data.folders import FolderDataSet

    if not isinstance(data, FolderDataSet):
        raise LoftError(f"--every-image serves {' and '.join(IMAGE_FOLDERS)}: omit it for {data.info.name}", usage=True)
    done, broken = 0, []
    for images, found in data.images.broken(loader_workers if loader_workers is not None else len(os.sched_getaffinity(0))):
        done, broken = done + images, broken + found
        told(done, len(data.images), len(broken))
    return broken


def write_list(path: Path, names: Iterable[str]) -> None:
    """A new list of images for --leave-out. Raises LoftError where it cannot be written."""
    from loft_hpc.data.leave_out import to_text
    from loft_hpc.files import write_atomically

    write_atomically(path, os.fsencode(to_text(names)))
