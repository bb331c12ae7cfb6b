"""A ticket: the filters that stay, the weights to start from, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loft_hpc.errors import LoftError
from loft_hpc.files import checksum, publish_folder, read_json, read_tensors, write_json, write_tensors
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import filter_groups, slice_state


@dataclass(frozen=True)
class Ticket:
    """A filter ticket of a residual network.

    `selection` holds the kept filters of every residual block (all of them, for a block that was not pruned); `state` is the
    physically smaller network: the same parameters and statistics as in the full network, without the other filters.
    """

    path: Path
    architecture: Architecture
    selection: dict[str, Tensor]
    state: dict[str, Tensor]
    provenance: dict[str, Any]
    """Method, ratio and so on, and the run it was drawn from."""

    @property
    def hidden_widths(self) -> dict[str, int]:
        return {name: len(kept) for name, kept in self.selection.items()}

    @property
    def run_path(self) -> Path:
        """The run that the ticket lies in: RUN/tickets/NAME."""
        return self.path.resolve().parent.parent

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and, through their shapes, the widths: what tells one ticket from another."""
        return checksum(self.state)

    def slice(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This ticket's part of another state of the full network, for instance its initialisation."""
        groups = filter_groups(self.architecture)
        parameters = {name: tensor for name, tensor in full.items() if name in self.state}
        missing = [group.filters for group in groups if group.filters not in parameters]
        if missing:
            raise LoftError(f"the state to rewind to lacks {missing[0]}: it belongs to another network")
        return slice_state(parameters, self.selection, groups)

    def write(self) -> None:
        """Leave the ticket's folder on disk, complete or not at all. Raises LoftError if there is one already."""
        refuse_existing(self.path)
        temporary = self.path.with_name(f".{self.path.name}.new")
        mask = {
            group.name: torch.zeros(group.width, dtype=torch.uint8).index_fill(0, self.selection[group.name], 1)
            for group in filter_groups(self.architecture)
        }
        write_tensors(temporary / "mask.safetensors", mask)
        write_tensors(temporary / "model.safetensors", self.state)
        description = {
            "kind": "filter ticket",
            "architecture": self.architecture.to_json(),
            "hidden_widths": self.hidden_widths,
            **self.provenance,
        }
        write_json(temporary / "ticket.json", description)
        publish_folder(temporary, self.path)

    @classmethod
    def read(cls, path: Path) -> "Ticket":
        """A ticket from disk. Raises LoftError where `path` is none, or where its files do not fit together."""
        if not (path / "ticket.json").is_file():
            hint = "it is a run" if (path / "run.json").is_file() else "no ticket.json in it" if path.is_dir() else "no such folder"
            raise LoftError(f"{path} is no ticket ({hint}): give a folder that `loft prune` printed")
        description = read_json(path / "ticket.json")
        try:
            architecture = Architecture.from_json(description.pop("architecture"))
            widths = dict(description.pop("hidden_widths"))
        except (KeyError, TypeError, ValueError) as problem:
            raise LoftError(f"{path / 'ticket.json'} lacks its network or widths ({problem}): restore it or prune again") from None
        masks = read_tensors(path / "mask.safetensors")
        selection = {}
        for group in filter_groups(architecture):
            mask = masks.get(group.name)
            if mask is None or mask.dtype != torch.uint8 or mask.shape != (group.width,) or mask.max() > 1 or not mask.any():
                raise LoftError(f"{path / 'mask.safetensors'} holds no mask of 0 and 1 over the {group.width} filters of {group.name}")
            selection[group.name] = mask.nonzero().flatten()
            if widths.get(group.name) != len(selection[group.name]):
                raise LoftError(f"{path / 'ticket.json'} and mask.safetensors disagree on {group.name}: restore them or prune again")
        return cls(path, architecture, selection, read_tensors(path / "model.safetensors"), description)


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise LoftError(f"the ticket {path} exists already and is never overwritten: name another with --name, or remove it")
