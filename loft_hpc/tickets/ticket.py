"""A ticket: a mask over filters, blocks or weights, the weights to start from, and where both came from."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loft_hpc.data.inputs import NetworkInput
from loft_hpc.errors import LoftError
from loft_hpc.files import checksum, publish_folder, read_json, read_tensors, write_json, write_tensors
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import parameters_of
from loft_hpc.tickets.masks import MASKS, FilterMask, Mask


@dataclass(frozen=True)
class Cost:
    """What it took to find a ticket, training of the network that it was drawn from included, summed over the ranks."""

    epochs: float = 0.0
    """Walks through the training images, of all ranks together: `samples` over the number of training images."""
    samples: int = 0
    """Images that went forward and backward."""
    flops: float = 0.0
    """Of forward and backward passes: three times the forward pass's, a multiply-add counting 2; masked weights count like others."""
    payload_bytes: int = 0
    """Sent by all ranks, as the byte ledger counts them."""
    wall_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def from_json(cls, fields: Any) -> "Cost":
        """From a ticket's description; nothing where there is none (tickets of earlier versions). Raises ValueError for anything else."""
        if fields is None:
            return cls()
        if not isinstance(fields, dict) or any(
            type(value) not in (int, float) or not math.isfinite(value) or value < 0 for value in fields.values()
        ):
            raise ValueError("its cost is no set of numbers")
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


@dataclass(frozen=True)
class Ticket:
    """A ticket of a residual network.

    `state` is what to start from: of a filter or layer ticket the physically smaller network, of a weight ticket the
    whole one with zeros; parameters, and normalisation statistics that were re-estimated for the ticket itself
    (docs/decisions/0012). Tickets of earlier versions have those of the dense network, cut, or none, and no `input`.
    """

    path: Path
    mask: Mask
    state: dict[str, Tensor]
    provenance: dict[str, Any]
    """Method, ratio and so on, cost, and the run it was drawn from."""
    scores: dict[str, Tensor] | None = None
    """What the units were ranked by, as the mask's tensors, larger being better; None where nothing was ranked."""
    input: NetworkInput | None = None
    """How to feed it; None for tickets of earlier versions."""

    @property
    def dense(self) -> Architecture:
        """The network that it is a ticket of."""
        return self.mask.dense

    @property
    def architecture(self) -> Architecture:
        return self.mask.architecture

    @property
    def hidden_widths(self) -> dict[str, int]:
        return self.mask.hidden_widths

    @property
    def selection(self) -> dict[str, Tensor]:
        """The kept filters of every block, of a filter ticket."""
        if not isinstance(self.mask, FilterMask):
            raise LoftError(f"{self.path} is a {self.mask.kind} ticket: it selects no filters")
        return self.mask.selection

    @property
    def run_path(self) -> Path:
        """The run that the ticket lies in: RUN/tickets/NAME."""
        return self.path.resolve().parent.parent

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parameters (and, through their shapes, the widths), and over a mask of weights: what tells
        one ticket from another.

        Statistics are left out: nothing starts from them, and their last bits depend on the number of ranks.
        """
        return checksum({**parameters_of(self.state), **self._masks})

    @property
    def fingerprints(self) -> tuple[str, str]:
        """`fingerprint`, and the one of earlier versions, which covered statistics too: runs on disk hold either."""
        return self.fingerprint, checksum({**self.state, **self._masks})

    @property
    def _masks(self) -> dict[str, Tensor]:
        return {f"mask/{name}": mask for name, mask in (self.mask.weights or {}).items()}

    @property
    def cost(self) -> Cost:
        return Cost.from_json(self.provenance.get("cost"))

    @property
    def pruning_ratio(self) -> float:
        """Share of the units that is removed; `ratio` in the provenance is what was asked for, and all that older tickets say.

        Raises LoftError where ticket.json says no share.
        """
        share = self.provenance.get("pruning_ratio", self.provenance.get("ratio"))
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise LoftError(f"{self.path / 'ticket.json'} does not say what share was removed: restore it or prune again")
        return share

    def carve(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This ticket's part of another state of the dense network, for instance its initialisation."""
        return self.mask.carve(full)

    def write(self) -> None:
        """Leave the ticket's folder on disk, complete or not at all. Raises LoftError if there is one already."""
        refuse_existing(self.path)
        temporary = self.path.with_name(f".{self.path.name}.new")
        shutil.rmtree(temporary, ignore_errors=True)  # of a write that was killed
        write_tensors(temporary / "mask.safetensors", self.mask.tensors())
        write_tensors(temporary / "model.safetensors", self.state)
        if self.scores is not None:
            write_tensors(temporary / "scores.safetensors", self.scores)
        description = {
            "kind": f"{self.mask.kind} ticket",
            "architecture": self.dense.to_json(),
            "hidden_widths": self.hidden_widths,
            **({} if self.input is None else {"input": self.input.to_json()}),
            **self.provenance,
        }
        write_json(temporary / "ticket.json", description)
        publish_folder(temporary, self.path)

    @classmethod
    def read(cls, path: Path) -> "Ticket":
        """A ticket from disk. Raises LoftError where `path` is none, or where its files do not fit together."""
        if not (path / "ticket.json").is_file():
            hint = (
                "it is a run: loft retrain --dense takes its dense network"
                if (path / "run.json").is_file()
                else "no ticket.json in it"
                if path.is_dir()
                else "no such folder"
            )
            raise LoftError(f"{path} is no ticket ({hint}): give a folder that `loft prune` printed")
        description = read_json(path / "ticket.json")
        kind = description.pop("kind", "filter ticket")
        try:
            mask_kind = MASKS[re.sub(" ticket$", "", kind)]
            dense = Architecture.from_json(description.pop("architecture"))
            widths = dict(description.pop("hidden_widths"))
            Cost.from_json(description.get("cost"))
        except (KeyError, TypeError, ValueError) as problem:
            raise LoftError(f"{path / 'ticket.json'} lacks its kind, network or widths ({problem}): restore it or prune again") from None
        try:
            mask = mask_kind.of(dense, read_tensors(path / "mask.safetensors"))
        except ValueError as problem:
            raise LoftError(f"{path / 'mask.safetensors'} holds {problem}") from None
        for name, width in mask.hidden_widths.items():
            if widths.get(name) != width:
                raise LoftError(f"{path / 'ticket.json'} and mask.safetensors disagree on {name}: restore them or prune again")
        fed = _input(path, description.pop("input", None), dense)
        return cls(path, mask, read_tensors(path / "model.safetensors"), description, _scores(path, mask), fed)


def _input(path: Path, fields: Any, dense: Architecture) -> NetworkInput | None:
    if fields is None:
        return None
    try:
        fed = NetworkInput.from_json(fields)
        if (fed.channels, fed.num_classes) != (dense.in_channels, dense.num_classes):
            raise ValueError("channels or classes of another network")
    except ValueError as problem:
        raise LoftError(f"{path / 'ticket.json'} has an input with {problem}: restore it or prune again") from None
    return fed


def _scores(path: Path, mask: Mask) -> dict[str, Tensor] | None:
    file = path / "scores.safetensors"
    if not file.exists():
        return None
    scores = read_tensors(file)
    shapes = {name: tensor.shape for name, tensor in mask.tensors().items()}
    if {name: tensor.shape for name, tensor in scores.items()} != shapes or any(scores[name].isnan().any() for name in scores):
        raise LoftError(f"{file} does not score what the mask covers: restore it, or remove it")
    return scores


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise LoftError(f"the ticket {path} exists already and is never overwritten: name another with --name, or remove it")
