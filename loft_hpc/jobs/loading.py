"""A run's or ticket's network as a plain module, for use outside of this program: no MPI, no Horovod."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loft_hpc
from loft_hpc.comm.alone import Alone
from loft_hpc.data.dataset import DataInfo
from loft_hpc.data.inputs import NetworkInput
from loft_hpc.data.registry import Reading, open_data
from loft_hpc.errors import LoftError
from loft_hpc.jobs.measure import Subject, open_subject
from loft_hpc.jobs.trained_on import TrainedOn, meet
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.runs.run import Run
from loft_hpc.training.evaluation import network_for, reestimate_statistics


def load(path: Path, data_dir: str | None) -> ResidualNetwork:
    """The network with its statistics, in evaluation mode on the CPU, and what is known of it as its attribute
    `metadata`.

    Statistics and input of tickets and runs of earlier versions, which do not have them, are made from the data, opened
    in `data_dir` (by default where the run found them). Raises LoftError where `path` holds neither a ticket nor a
    finished run.
    """
    subject = open_finished(path)
    cpu = torch.device("cpu")
    network = network_for(subject.architecture, subject.hidden_widths, subject.state, cpu, str(path))
    fed = subject.input
    if fed is None or not has_statistics(subject):
        world = Alone()
        try:
            data = open_data(subject.data.read(Reading(data_dir)), cpu, world)
        except LoftError as problem:
            raise LoftError(
                f"{path} was made by an earlier version, without statistics or input of its own, which are made from "
                f"the data now: {problem}"
            ) from None
        fed, _ = input_of(subject, data.info)
        reestimate_statistics(network, data, subject.evaluation, world)
    network = network.to(memory_format=torch.contiguous_format).eval()
    network.metadata = metadata(subject, fed, None if subject.kind == "ticket" else Run.open(path).accuracy)
    return network


def open_finished(path: Path) -> Subject:
    """A ticket, or a run that has come to its end. Raises LoftError for anything else."""
    if (path / "run.json").is_file() and not (path / "ticket.json").is_file():
        status = Run.open(path).description.get("status")
        if status != "done":
            raise LoftError(f"{path} is not finished (status: {status}): finish it with --resume first")
    return open_subject(path)


def has_statistics(subject: Subject) -> bool:
    """Whether its state holds statistics that are its own: not cut from another network's."""
    return subject.input is not None and network_statistics(subject) <= subject.state.keys()


def network_statistics(subject: Subject) -> set[str]:
    """Names of the running means and variances that its network has."""
    with torch.device("meta"):
        network = ResidualNetwork(subject.architecture, subject.architecture.hidden_widths())
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return {f"{name}.{statistic}" for name in norms for statistic in ("running_mean", "running_var")}


def input_of(subject: Subject, info: DataInfo) -> tuple[NetworkInput, str | None]:
    """Its input, and what is to be told of the images. Raises LoftError where its classes or its normalisation are not these data's."""
    note, of_data = meet(TrainedOn.of(subject.path, subject.dense), info), NetworkInput.of(info)
    difference = None if subject.input is None else subject.input.difference(of_data)
    if difference:
        raise LoftError(
            f"{subject.path} belongs to other images: those of {subject.data.dataset} here differ in {difference}; give its --data-dir"
        )
    return of_data, note


def metadata(subject: Subject, fed: NetworkInput, accuracy: float | None, folded: bool = False) -> dict[str, Any]:
    """What is known of a network, as plain JSON values. The keys are part of the file formats (docs/file-formats.md).

    With `folded`, the network itself normalises: `mean` and `std` are what is left to do, nothing.
    """
    left = {"mean": [0.0] * fed.channels, "std": [1.0] * fed.channels} if folded else {}
    origin = subject.provenance
    return {
        "metadata_version": 1,
        "loft_hpc_version": loft_hpc.__version__,
        "input_layout": "N, C, H, W",
        "input_dtype": "float32",
        **fed.to_json(),
        **left,
        "normalisation_folded": folded,
        "dataset": subject.data.dataset,
        "synthetic_data": subject.data.synthetic,
        "architecture": subject.architecture.to_json(),
        "hidden_widths": subject.hidden_widths or subject.architecture.hidden_widths(),
        "kind": subject.kind,
        "name": subject.path.resolve().name,
        "run": _text(origin.get("run")),
        "method": _text(origin.get("method")),
        "ratio": _number(origin.get("ratio")),
        "pruning_ratio": _number(origin.get("pruning_ratio")),
        "accuracy": accuracy,
    }


def _text(value: Any) -> str | None:
    """A short text, as it may come from somebody's file."""
    return value[:255] if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and -1e300 < value < 1e300 and math.isfinite(value) else None
