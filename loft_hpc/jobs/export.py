"""`loft export`: a run or a ticket in, a file that others run out."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.registry import Reading, open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.loading import input_of, metadata, open_finished
from loft_hpc.models.formats import FORMATS, Format, FromPixels, Runnable
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import Score, judge, network_for

TOLERANCE = 1e-4
"""Largest difference between the network and what was read back, relative to the largest score of the image."""
COMPARED_IMAGES = 32


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and where to."""

    output: Path
    format: str
    fold_normalisation: bool = False
    """Put mean and standard deviation into the network, which then takes pixels from 0 to 1."""

    def __post_init__(self):
        if self.format not in FORMATS:
            raise LoftError(f"unknown format '{self.format}': choose one of {', '.join(FORMATS)}", usage=True)
        if self.output.suffix != self.writer.ending:
            raise LoftError(f"--output {self.output} must end in {self.writer.ending} for --format {self.format}", usage=True)
        if self.fold_normalisation and not self.writer.computes:
            raise LoftError(
                f"a {self.format} file holds no computation, so --fold-normalisation has no place in it: use pt2 or onnx", usage=True
            )

    @property
    def writer(self) -> Format:
        return FORMATS[self.format]


@dataclass(frozen=True)
class Difference:
    """Between the network's scores and those of the file that was read back."""

    images: int
    absolute: float
    relative: float
    """Of an image's largest difference to its largest score."""

    @property
    def small(self) -> bool:
        """Not so where anything is no number."""
        return self.relative <= TOLERANCE


@dataclass(frozen=True)
class Exported:
    files: list[Path]
    parameters: int
    score: Score
    difference: Difference
    note: str | None
    """About the images that statistics and accuracy are of."""


def export(path: Path, settings: ExportSettings, reading: Reading, device: str, world: World) -> Exported:
    """Write a run's or ticket's network, compare what was written with it, and publish. Collective; rank 0 writes.

    Normalisation statistics are re-estimated, and the accuracy counted, over all ranks. Raises LoftError where there is
    something at the output already, and where what was read back differs: then nothing is left.
    """
    settings.writer.refuse_missing_packages()
    world.on_root(lambda: refuse_output(settings))
    subject = open_finished(path)
    chosen, _ = place(device, "float32", world)
    data = open_data(subject.data.read(reading), chosen, world)
    fed, note = input_of(subject, data.info)
    network = network_for(subject.architecture, subject.hidden_widths, subject.state, chosen, str(path))
    score = judge(network, data, subject.evaluation, world)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    facts = metadata(subject, fed, score.accuracy, settings.fold_normalisation)

    def write() -> Difference:
        images = _images(data)
        inputs = data.pixels.to_pixels(images) if settings.fold_normalisation else images
        whole = FromPixels(network, fed.mean, fed.std).eval() if settings.fold_normalisation else network
        return _publish(whole, network(images), inputs, settings, facts)

    with torch.no_grad():
        difference = world.on_root(write)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Exported(settings.writer.files(settings.output), parameters, score, difference, note)


def refuse_output(settings: ExportSettings) -> None:
    """Raises LoftError where the output is there already, or has no folder to be in."""
    for file in settings.writer.files(settings.output):
        if file.exists() or file.is_symlink():
            raise LoftError(f"{file} exists already and is never overwritten: name another --output, or remove it")
    if not settings.output.parent.is_dir():
        raise LoftError(f"there is no folder {settings.output.parent}: make it first, or name another --output")


def _images(data: DataSet) -> Tensor:
    """Real test images, as the network takes them, (N, C, H, W)."""
    images, _ = next(iter(data.test_batches(COMPARED_IMAGES, 0, 1)))
    return images.float().cpu().contiguous()


def _publish(network: nn.Module, expected: Tensor, inputs: Tensor, settings: ExportSettings, facts: dict) -> Difference:
    """Write beside the output, read back, compare, and give the files their names."""
    files = settings.writer.files(settings.output)
    try:
        workshop = Path(tempfile.mkdtemp(prefix=f".{settings.output.name[:64]}.", dir=settings.output.parent))
        try:
            made = workshop / settings.output.name
            settings.writer.write(network, tuple(inputs.shape[1:]), made, facts)
            difference = compare(settings.writer.read(made), inputs, expected)
            if not difference.small:
                raise LoftError(
                    f"{settings.output} is not kept: read back, it differs from the network by {difference.relative:.2g} of "
                    f"an image's largest score, more than {TOLERANCE:g}: try another --format, and check that the network's scores are finite (loft measure)"
                )
            refuse_output(settings)
            for own, final in zip(settings.writer.files(made), files, strict=True):
                os.replace(own, final)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    except OSError as problem:
        raise LoftError(f"{settings.output} cannot be written ({problem.strerror or problem}): free space or name another folder") from None
    return difference


def compare(read_back: Runnable, inputs: Tensor, expected: Tensor) -> Difference:
    """The largest differences over all images, given as one image and as the rest: a batch may have any size."""
    batches = [batch for batch in (inputs[:1], inputs[1:]) if len(batch)]
    scores = torch.cat([read_back(batch) for batch in batches])
    if scores.shape != expected.shape:
        raise LoftError(f"what was read back gives scores {tuple(scores.shape)}, the network {tuple(expected.shape)}: try another --format")
    absolute = (scores - expected).abs().amax(1)
    relative = absolute / expected.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return Difference(len(inputs), float(absolute.max()), float(relative.max()))
