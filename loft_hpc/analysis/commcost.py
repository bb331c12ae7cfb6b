"""The communication cost of LoFT: the formula behind the poster's column, and the formula for a run of ours.

Legend: S workers, P partitioned and C shared parameters, R transfers, 4 bytes a parameter:

    cost(S) = 4 * R * (P + S * C)

what S workers together send (or receive) in R transfers [D in facts: loft.md]. The poster's cells follow for networks with doubled
hidden widths, the `paper` partition rule, R = 500 on CIFAR and 6000 on ImageNet; whether those are R one-way rounds or R/2 rounds
counted both ways the poster does not say.
"""

from dataclasses import dataclass

import torch

from loft_hpc.comm.ledger import Ledger
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, member_names, partitioned_groups
from loft_hpc.models.resnet import ResidualNetwork

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Division:
    """How a partition rule divides a network's trainable parameters."""

    partitioned: int
    shared: int


def division(network: Architecture, rule: str = "paper") -> Division:
    """Count P and C, normalisations' weights and biases included."""
    dealt = member_names(partitioned_groups(filter_groups(network), rule))
    with torch.device("meta"):
        parameters = dict(ResidualNetwork(network, network.hidden_widths()).named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    partitioned = sum(parameter.numel() for name, parameter in parameters.items() if name in dealt)
    return Division(partitioned, total - partitioned)


def loft_bytes(divided: Division, workers: int, transfers: int, momentum_travels: bool = False) -> int:
    """cost(S) above, in bytes; momentum that travels along doubles every buffer. One worker alone sends nothing."""
    if workers == 1:
        return 0
    values = divided.partitioned + workers * divided.shared
    return FLOAT32_BYTES * transfers * values * (2 if momentum_travels else 1)


@dataclass(frozen=True)
class PosterCell:
    """One LoFT cell of the poster's table, as printed, with what it is compared to."""

    model: str
    dataset: str
    classes: int
    stem: str
    transfers: int
    workers: int
    printed_gigabytes: float
    """G in the poster: 10^9 bytes."""
    gpipe_printed_gigabytes: float
    improvement_printed: float


def _cells() -> tuple[PosterCell, ...]:
    cifar = (131.88, 461.60)
    imagenet = (20954.24, 52385.59)
    rows = (
        ("preresnet34", "CIFAR-10", 10, "cifar", 500, cifar, (104.59, 144.27), (1.26, 3.20)),
        ("resnet34", "CIFAR-10", 10, "cifar", 500, cifar, (104.60, 144.29), (1.26, 3.20)),
        ("preresnet34", "CIFAR-100", 100, "cifar", 500, cifar, (104.77, 144.64), (1.26, 3.19)),
        ("resnet34", "CIFAR-100", 100, "cifar", 500, cifar, (104.78, 144.66), (1.26, 3.19)),
        ("preresnet18", "ImageNet", 1000, "imagenet", 6000, imagenet, (791.09, 1284.84), (21.60, 40.77)),
    )
    return tuple(
        PosterCell(model, dataset, classes, stem, transfers, workers, cost, pipeline, improvement)
        for model, dataset, classes, stem, transfers, pipelines, costs, improvements in rows
        for workers, pipeline, cost, improvement in zip((2, 4), pipelines, costs, improvements, strict=True)
    )


POSTER = _cells()


@dataclass(frozen=True)
class PosterRow:
    """A poster cell beside the formula."""

    cell: PosterCell
    divided: Division
    gigabytes: float
    """The formula's value."""
    difference_gigabytes: float
    """Formula minus printed."""
    improvement: float
    """The printed GPipe cost over the printed LoFT cost."""
    misprint: bool
    """Whether the printed improvement is not that quotient."""


def poster_table() -> list[PosterRow]:
    """All ten LoFT cells, recomputed from the networks themselves."""
    rows = []
    for cell in POSTER:
        divided = division(architecture(cell.model, cell.classes, stem=cell.stem, widen=2))
        gigabytes = loft_bytes(divided, cell.workers, cell.transfers) / 1e9
        improvement = cell.gpipe_printed_gigabytes / cell.printed_gigabytes
        # Printed to two digits: 0.01 covers rounding of the quotient's parts.
        misprint = abs(improvement - cell.improvement_printed) > 0.01
        rows.append(PosterRow(cell, divided, gigabytes, gigabytes - cell.printed_gigabytes, improvement, misprint))
    return rows


def exchanged_bytes(ledgers: list[Ledger]) -> int:
    """What the workers of a run handed over in their exchanges, by the ledger: the poster's accounting, one way."""
    return sum(
        ledger.entry(operation, purpose).poster_bytes
        for ledger in ledgers
        for operation, purpose in (("allgather", "partitioned"), ("allreduce", "shared"))
    )
