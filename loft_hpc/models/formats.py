"""Formats in which a network leaves this program: each writes a file, and reads it back as something that runs."""

import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loft_hpc.errors import LoftError
from loft_hpc.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from loft_hpc.jsontext import to_json_text
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import build

Metadata = Mapping[str, Any]
"""Plain JSON values by key (docs/file-formats.md)."""
Runnable = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) float32 -> scores (N, classes)."""

INPUT_NAME, OUTPUT_NAME = "images", "scores"
PT2_METADATA = "metadata.json"
"""Name of the extra file inside a pt2 file."""
_FLAT = 1e-4
"""Standard deviation of an image without contrast, as `data.dataset.PixelRange` has it."""
_PROTOBUF_BYTES = 2**31 - 2**20
"""No protobuf message is larger than 2 GiB."""


class FromPixels(nn.Module):
    """A network behind its normalisation: takes pixels from 0 (black) to 1 (white).

    `mean` and `std` are channel by channel; without them every image is normalised by its own.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...] | None, std: tuple[float, ...] | None):
        super().__init__()
        self.network = network
        self.by_itself = mean is None or std is None
        if not self.by_itself:
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        if not self.by_itself:
            return self.network((pixels - self.mean) / self.std)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return self.network((pixels - mean) / pixels.std((1, 2, 3), correction=0, keepdim=True).clamp_min(_FLAT))


class Format(ABC):
    """A format, with what it needs."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """What must be installed, by the name that is imported."""
    computes: ClassVar[bool] = True
    """Whether the file holds the computation too, not the tensors alone."""

    @property
    def ending(self) -> str:
        return f".{self.name}"

    def files(self, path: Path) -> list[Path]:
        """The files that an export to `path` consists of."""
        return [path]

    def refuse_missing_packages(self) -> None:
        """Raises LoftError, naming what to install."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise LoftError(f"--format {self.name} needs {', '.join(missing)}: pip install {' '.join(missing)}")

    @abstractmethod
    def write(self, network: nn.Module, image: tuple[int, int, int], path: Path, metadata: Metadata) -> None:
        """Write a network in evaluation mode, on the CPU, for any number of images (C, H, W). Raises LoftError where
        it cannot."""

    @abstractmethod
    def read(self, path: Path) -> Runnable:
        """What was written, as something that runs, with nothing taken from anywhere else."""


class Pt2(Format):
    """torch.export: one file that needs torch alone."""

    name = "pt2"

    def write(self, network: nn.Module, image: tuple[int, int, int], path: Path, metadata: Metadata) -> None:
        with _quiet():
            program = torch.export.export(network, (_example(image),), dynamic_shapes=({0: _batch()},))
            content = io.BytesIO()
            torch.export.save(program, content, extra_files={PT2_METADATA: to_json_text(metadata)})
        write_atomically(path, content.getvalue())

    def read(self, path: Path) -> Runnable:
        with _quiet():
            return torch.export.load(path).module()


class Onnx(Format):
    """ONNX: one file, for onnxruntime and everything else that reads it."""

    name = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, network: nn.Module, image: tuple[int, int, int], path: Path, metadata: Metadata) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        if size > _PROTOBUF_BYTES:
            raise LoftError(f"an ONNX file holds at most 2 GiB, and this network is {size / 2**30:.1f} GiB: use --format pt2")
        with _quiet():
            program = torch.onnx.export(
                network, (_example(image),), dynamo=True, verbose=False, dynamic_shapes=({0: _batch()},),
                input_names=[INPUT_NAME], output_names=[OUTPUT_NAME],
            )  # fmt: skip
            model = program.model_proto
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=to_json_text(value))
        write_atomically(path, model.SerializeToString())

    def read(self, path: Path) -> Runnable:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})[0])


class Safetensors(Format):
    """The state dict, and its metadata in a JSON file beside it."""

    name = "safetensors"
    computes = False

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".json")]

    def write(self, network: nn.Module, image: tuple[int, int, int], path: Path, metadata: Metadata) -> None:
        write_tensors(path, network.state_dict(), {key: to_json_text(value) for key, value in metadata.items()})
        write_json(path.with_suffix(".json"), metadata)

    def read(self, path: Path) -> Runnable:
        facts = read_json(path.with_suffix(".json"))
        network = build(Architecture.from_json(facts["architecture"]), facts["hidden_widths"])
        network.load_state_dict(read_tensors(path))
        return network.eval()


FORMATS: dict[str, Format] = {made.name: made for made in (Pt2(), Onnx(), Safetensors())}


def _example(image: tuple[int, int, int]) -> Tensor:
    """Two images: torch.export takes a batch of one for a constant."""
    return torch.zeros(2, *image)


def _batch() -> Any:
    return torch.export.Dim("batch", min=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
