"""Reading images from disk against the usual torchvision loader, and starting up with an index against torchvision's walk.

`plain` is ImageFolder and torch's DataLoader with the reference recipe: Pillow images, random resized crop, flip, conversion and normalisation in
the worker processes. `ours` reads the same JPEG files as a folder, as a tar for each class, and as WebDataset shards, and ends with the same
float32 batches. Sides take turns in the same run; a repetition is one epoch. CPU time is that of this process and its workers. `decoding` is
what Pillow's JPEG decoder alone takes of an image, files in memory: no loader that decodes on the CPU can be faster. Needs no mpirun: RANKS=1 will do.
"""

import io
import itertools
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import click
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loft_hpc.data.folders import training_keys
from loft_hpc.data.index import index_of
from loft_hpc.data.listing import list_split
from loft_hpc.data.loader import NORMALISATION, Images, Loader, decode
from loft_hpc.data.order import Order

SOURCES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg")
SIZES = ((500, 375), (375, 500), (500, 333))
CLASSES = 8


def make_images(folder: Path, count: int) -> None:
    """JPEG files of ImageNet's usual sizes: random parts of natural photographs, between all of one and a quarter of its area."""
    draw = np.random.default_rng(0)
    photographs = [Image.open(Path(skimage.data.__file__).parent / name).convert("RGB") for name in SOURCES]
    for number in range(count):
        photograph, (width, height) = photographs[draw.integers(len(photographs))], SIZES[draw.integers(len(SIZES))]
        scale = min(photograph.width / width, photograph.height / height) * draw.uniform(0.5, 1)
        left, top = draw.uniform(0, photograph.width - scale * width), draw.uniform(0, photograph.height - scale * height)
        path = folder / "train" / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = photograph.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + scale * width, top + scale * height))
        part.save(path, quality=95)


def make_tars(folder: Path, tars: Path, shards: Path) -> None:
    """The same images, with a tar for each class, and in four WebDataset shards."""
    for root in (tars, shards):
        (root / "train").mkdir(parents=True)
    files = sorted(folder.glob("train/*/*.jpg"))
    for label, name in enumerate(sorted({file.parent.name for file in files})):
        with tarfile.open(tars / "train" / f"{name}.tar", "w") as tar:
            tar.add(folder / "train" / name, ".")
        for shard in range(4):
            with tarfile.open(shards / "train" / f"shard{shard}.tar", "a") as tar:
                for file in files[shard::4]:
                    if file.parent.name == name:
                        tar.add(file, file.name)
                        content = str(label).encode()
                        member = tarfile.TarInfo(f"{file.stem}.cls")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def plain(folder: Path, size: int, batch: int, workers: int) -> Callable[[], Iterable]:
    recipe = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(NORMALISATION.mean, NORMALISATION.std), v2.ToPureTensor()]
    context = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    images = ImageFolder(folder / "train", v2.Compose([*recipe, *finish]))
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=workers, **context)
    return lambda: loader


def ours(folder: Path, size: int, batch: int, workers: int) -> Callable[[], Iterable]:
    index = index_of(folder, "train", list_split)
    loader = Loader(Images(folder, {"train": index}, size), workers, torch.device("cpu"))
    order = Order("replicated", len(index), batch, 0, 0, 1)
    return lambda: loader.batches(itertools.islice(training_keys([order], 0), order.steps_per_epoch))


def cpu_seconds() -> float:
    """Of this process and its workers so far."""
    ticks = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def decoding_seconds(folder: Path) -> float:
    """CPU time of Pillow's decoder for an image."""
    contents = [file.read_bytes() for file in sorted(folder.glob("train/*/*.jpg"))[:500]]
    begun = time.process_time()
    for content in contents:
        decode(content)
    return (time.process_time() - begun) / len(contents)


def show(label: str, values: list[float], unit: str, against: list[float], more: str = "") -> None:
    low, median, high = statistics.quantiles(values, n=4)
    ratio = statistics.median(values) / statistics.median(against)
    click.echo(f"{label:28} median {median:9,.1f} {unit}   quartiles {low:,.1f} to {high:,.1f}   {ratio:.2f} x plain{more}")


def compare_reading(root: Path, images: int, size: int, batch: int, workers: int, repetitions: int) -> None:
    make_images(root / "folder", images)
    make_tars(root / "folder", root / "tars", root / "shards")
    mean_bytes = statistics.mean(file.stat().st_size for file in root.glob("folder/train/*/*.jpg"))
    sides = {"plain, folder": plain(root / "folder", size, batch, workers)}
    sides |= {f"ours, {layout}": ours(root / layout, size, batch, workers) for layout in ("folder", "tars", "shards")}
    click.echo(
        f"{images} JPEG images of 500x375 pixels or the like, {mean_bytes / 1e3:.0f} kB each, to {size}x{size}; batch {batch}, {workers} workers on "
        f"{len(os.sched_getaffinity(0))} cores, {repetitions} repetitions"
    )
    rates: dict[str, list[float]] = {name: [] for name in sides}
    efficiencies: dict[str, list[float]] = {name: [] for name in sides}
    decoding = []
    for repetition in range(repetitions + 1):
        for name, epoch in sides.items():
            begun, used = time.perf_counter(), cpu_seconds()
            seen = sum(len(labels) for _, labels in epoch())
            if repetition:  # the first pass starts the workers
                rates[name].append(seen / (time.perf_counter() - begun))
                efficiencies[name].append(seen / (cpu_seconds() - used))
        decoding.append(decoding_seconds(root / "folder"))
    for name, values in rates.items():
        show(name, values, "images/s", rates["plain, folder"])
    for name, values in efficiencies.items():
        share = statistics.median(values) * statistics.median(decoding)
        show(name, values, "images per CPU second", efficiencies["plain, folder"], f", decoding {100 * share:.0f} % of the CPU time")
    low, median, high = statistics.quantiles([1 / seconds for seconds in decoding], n=4)
    click.echo(f"{'decoding alone':28} median {median:9,.1f} images per CPU second   quartiles {low:,.1f} to {high:,.1f}")


def compare_starting(root: Path, files: int, repetitions: int) -> None:
    """Time from nothing to a list of images, directories in the file system's cache."""
    for number in range(files):
        path = root / "train" / f"n{number % 1000:08}" / f"n{number % 1000:08}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sides = {
        "plain: ImageFolder's walk": lambda: ImageFolder(root / "train"),
        "ours: listing": lambda: list_split(root, "train"),
        "ours: with the index kept": lambda: index_of(root, "train", list_split),
    }
    index_of(root, "train", list_split)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, start in sides.items():
            begun = time.perf_counter()
            start()
            times[name].append(1e3 * (time.perf_counter() - begun))
    click.echo(f"{files:,} empty files in {min(files, 1000):,} folders, {repetitions} repetitions")
    for name, values in times.items():
        show(name, values, "ms", times["plain: ImageFolder's walk"])
    for name, images in {
        "plain": sides["plain: ImageFolder's walk"](),
        "ours": Images(root, {"train": list_split(root, "train")}, 224),
    }.items():
        click.echo(f"{name + ': sent to each worker':28} {len(ForkingPickler.dumps(images)):,} bytes")


@click.command(help=__doc__)
@click.option("--images", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--image-size", type=int, default=224, show_default=True)
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option("--files", type=click.IntRange(1), default=100_000, show_default=True, help="Empty files of the start-up comparison.")
@click.option("--repetitions", type=click.IntRange(3), default=9, show_default=True)
def main(images: int, image_size: int, batch_size: int, workers: int, files: int, repetitions: int) -> None:
    torch.set_num_threads(1)  # the workers have the cores
    with tempfile.TemporaryDirectory() as folder:
        compare_reading(Path(folder) / "images", images, image_size, batch_size, workers, repetitions)
        compare_starting(Path(folder) / "names", files, repetitions)


if __name__ == "__main__":
    main()
