"""loft-hpc: lottery tickets in convolutional networks, found by filter-wise training over MPI ranks.

`load_ticket` and `load_run` give networks to programs of one's own; what goes wrong is a `LoftError`.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from loft_hpc.errors import LoftError

if TYPE_CHECKING:
    from loft_hpc.models.resnet import ResidualNetwork

__version__ = "0.1.0"
__all__ = ["LoftError", "load_run", "load_ticket"]


def load_ticket(path: str | PathLike[str], data_dir: str | None = None) -> ResidualNetwork:
    """A ticket's network: an nn.Module in evaluation mode, on the CPU, with BatchNorm statistics. Needs neither MPI nor
    Horovod.

    Input is (N, channels, image_size, image_size) float32, output (N, num_classes). The module's attribute `metadata`
    is a dictionary:

        mean, std          input is (pixel - mean) / std, channel by channel, of pixels from 0 (black) to 1 (white); None where every
                           image is normalised by itself
        channels, image_size, num_classes
        classes            names by label; empty where labels are numbers alone
        architecture, hidden_widths
                           the network, and the filters that each of its blocks kept
        kind, name, run, method, ratio, dataset
                           where it came from
        accuracy           on the test images, 0 to 1; None where it was never counted

    (docs/file-formats.md has all of them). A ticket of an earlier version has no statistics of its own: they are
    re-estimated from the data, in `data_dir` or where the run found them. Raises LoftError where `path` is no ticket, or
    where its files are damaged.
    """
    return _load(path, data_dir, "ticket.json", "ticket: give a folder that `loft prune` printed")


def load_run(path: str | PathLike[str], data_dir: str | None = None) -> ResidualNetwork:
    """The final network of a pretraining or retraining run, as `load_ticket` gives one. Raises LoftError where the
    run is not finished."""
    return _load(path, data_dir, "run.json", "run: give a folder that `loft pretrain` or `loft retrain` printed")


def _load(path: str | PathLike[str], data_dir: str | None, file: str, otherwise: str) -> ResidualNetwork:
    from pathlib import Path

    from loft_hpc.jobs.loading import load  # torch takes seconds to import, and `loft --help` needs none of it

    if not (Path(path) / file).is_file():
        raise LoftError(f"{path} is no {otherwise}")
    return load(Path(path), data_dir)
