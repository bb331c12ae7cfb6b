"""`loft pretrain --weights`: parameters of a file to start from, compared with the network tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.files import read_any_tensors
from loft_hpc.jobs.agreement import refuse_disagreement
from loft_hpc.models.groups import parameters_of
from loft_hpc.models.resnet import CLASSIFIER
from loft_hpc.runs.run import Run

HALVES = (torch.float16, torch.bfloat16)
_NAME_LENGTH = 80


def starting_parameters(
    path: Path, drawn: Mapping[str, Tensor], new_classifier: bool, earlier: Run | None, world: World
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters of a safetensors file, with `drawn` for the classifier where that is made anew, and what run.json says of the file.

    `drawn`: the network's parameters as its seed gives them. A run that goes on from a checkpoint takes nothing from the file and gets
    `drawn`; one that has none yet reads the file again. Raises LoftError where the file cannot be read, is not the one that the run was
    started with, or is of another network. Collective.
    """
    if earlier and world.on_root(earlier.checkpoints.any):
        return dict(drawn), {}
    tensors, digest = read_any_tensors(path)
    refuse_disagreement({f"--weights {path}, SHA-256": digest}, world)
    if earlier and earlier.required("weights", dict).get("sha256") != digest:
        raise LoftError(
            f"{path} is not the file that {earlier.path} was started with (its SHA-256 differs): restore it, or start another run"
        )
    return _fitting(path, parameters_of(tensors), drawn, new_classifier), {"weights": {"path": str(path), "sha256": digest}}


def _fitting(path: Path, theirs: Mapping[str, Tensor], drawn: Mapping[str, Tensor], new_classifier: bool) -> dict[str, Tensor]:
    """The parameters as float32, in the order of `drawn`. Raises LoftError, naming the first tensor that differs."""
    body = {name: tensor for name, tensor in drawn.items() if not name.startswith(CLASSIFIER)}
    problem = _difference({name: tensor for name, tensor in theirs.items() if not name.startswith(CLASSIFIER)}, body)
    if problem:
        raise LoftError(
            f"{path} holds another network: {problem}: give the --model, --widen, --dataset and --image-size that its weights are of"
        )
    taken = body if new_classifier else drawn
    problem = None if new_classifier else _difference(theirs, drawn)
    if problem:
        raise LoftError(f"{path} has another classifier: {problem}: give --new-classifier to draw one from the seed")
    made = dict(drawn)
    for name in taken:
        made[name] = theirs[name].float().clone()
        if not made[name].isfinite().all():
            raise LoftError(f"{path} holds numbers in {name} that are not finite: give weights that can be trained")
    return made


def _difference(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The first tensor that differs, with both shapes; None where there is none."""
    for name, tensor in own.items():
        shape = tuple(tensor.shape)
        if name not in theirs:
            return f"{name} is missing there, and {shape} here"
        if theirs[name].shape != tensor.shape:
            return f"{name} is {tuple(theirs[name].shape)} there, and {shape} here"
        if theirs[name].dtype not in (tensor.dtype, *HALVES):
            return f"{name} {shape} is of {_dtype(theirs[name])} there, and of {_dtype(tensor)} here"
    unknown = next((name for name in theirs if name not in own), None)
    return None if unknown is None else f"{unknown[:_NAME_LENGTH]} is {tuple(theirs[unknown].shape)} there, and unknown here"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
