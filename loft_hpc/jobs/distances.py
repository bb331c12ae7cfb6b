"""`loft measure --distance-to`: how far a run's rankings of its filters are from others, snapshot by snapshot."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from loft_hpc.analysis.distance import GroupDistance, mean_normalised, score_distance
from loft_hpc.errors import LoftError
from loft_hpc.files import read_tensors
from loft_hpc.jobs.measure import open_subject
from loft_hpc.jobs.retrain import snapshot_name
from loft_hpc.jobs.stops import Stability, stability
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.groups import State, filter_groups
from loft_hpc.models.scores import CRITERIA, by_group, filter_scores
from loft_hpc.runs.run import Run

Ranked = dict[str, np.ndarray]
"""The scores of every group's filters by one criterion."""


@dataclass(frozen=True)
class Distances:
    """Filter distance of one snapshot's rankings to the reference's, group by group."""

    step: int
    epoch: float
    """Epochs done, from 0 for the initialisation."""
    groups: list[GroupDistance]

    @property
    def label(self) -> str:
        return f"epoch {self.epoch:g}" if self.epoch == int(self.epoch) else f"epoch {self.epoch:.2f}"

    @property
    def mean_normalised(self) -> float:
        return mean_normalised(self.groups)


@dataclass(frozen=True)
class Course:
    """A run's distances over its pretraining, and its loss."""

    path: Path
    label: str
    """Strategy and workers, for instance loft+4."""
    rows: list[Distances]
    losses: list[tuple[float, float]]
    """(epochs done, mean training loss of the last one)."""
    stability: Stability | None
    """Where the run's rule says that its rankings are stable; None where it cannot."""
    moves: list[tuple[float, float]]
    """(epochs done, distance to the snapshot before, over the filters that the rule has in view): what the rule compares."""


def distances(path: Path, reference: str, criterion: str, ratio: float = 0.0) -> Course:
    """The distance of every snapshot of the run to `reference`, over the filters that a pruning `ratio` leaves (0: all of them).

    `reference`: `final` (the run's own final network), `previous` (the snapshot before), `init`, `epoch:K` or `step:K` (a snapshot of
    the run), a file with a snapshot, or another run (its final network). Raises LoftError where there is nothing to compare.
    """
    if not (path / "run.json").is_file():
        raise LoftError(f"{path} is no run: distances follow a run's snapshots, give the folder that loft pretrain printed")
    run = Run.open(path)
    snapshots = list(_snapshots(run, criterion))
    per_epoch = run.required("steps_per_epoch", int)
    if not snapshots or (reference == "previous" and len(snapshots) < 2):
        raise LoftError(f"{path} has not enough snapshots to compare: pretrain with --snapshot-every 1ep")
    if reference == "previous":
        pairs = [(step, ranked, before) for (_, before), (step, ranked) in pairwise(snapshots)]
    else:
        other = _reference(run, reference, criterion)
        pairs = [(step, ranked, other) for step, ranked in snapshots]
    rows = [Distances(step, step / per_epoch, score_distance(ranked, other, ratio)) for step, ranked, other in pairs]
    losses = [(event["step"] / per_epoch, event["loss"]) for event in run.events("epoch") if isinstance(event.get("loss"), float)]
    seen = [(event.get("epoch"), event.get("top_distance_to_previous")) for event in run.events("snapshot")]
    moves = [(epoch, move) for epoch, move in seen if isinstance(epoch, int | float) and isinstance(move, float)]
    return Course(path, run.label, rows, losses, stability(run) if run.description.get("kind") == "pretrain" else None, moves)


def _snapshots(run: Run, criterion: str) -> Iterator[tuple[int, Ranked]]:
    """(step, scores), in their order; out of the full network where a run of an earlier version recorded no scores."""
    scored = set(run.snapshots.score_steps())
    full = {run.snapshots.step(name): name for name in run.snapshots.names()}
    for step in sorted(scored | full.keys()):
        if step in scored:
            yield step, by_group(run.snapshots.read_scores(step), criterion)
        else:
            yield step, _ranked(run.architecture, run.snapshots.read(full[step]), criterion, run.snapshots.path(full[step]))


def _ranked(architecture: Architecture, state: State, criterion: str, path: Path) -> Ranked:
    """The scores of a network's filters. Raises LoftError, naming the file, where its tensors are none of such a network."""
    groups = filter_groups(architecture)
    for group in groups:
        if group.filters in state:
            weight, scale = state[group.filters], state.get(group.scale)
            shapes = weight.dim() == 4 and scale is not None and scale.shape == weight.shape[:1]
            if not shapes or not weight.numel() or {weight.dtype, scale.dtype} != {torch.float32}:
                raise LoftError(f"{path} does not fit its description ({group.name} is no block): restore it or make it anew")
    return by_group(filter_scores(state, groups, [criterion]), criterion)


def _reference(run: Run, reference: str, criterion: str) -> Ranked:
    if reference == "final":
        return _ranked(run.architecture, run.read_model(), criterion, run.model_path)
    if reference == "init" or reference.startswith(("epoch:", "step:")):
        name = snapshot_name(reference, "--distance-to")
        for step in run.snapshots.score_steps():
            if run.snapshots.name(step) == name:
                return by_group(run.snapshots.read_scores(step), criterion)
        return _ranked(run.architecture, run.snapshots.read(name), criterion, run.snapshots.path(name))
    if reference.endswith(".safetensors"):
        tensors = read_tensors(Path(reference))
        scored = all(name.startswith(tuple(f"{known}/" for known in CRITERIA)) for name in tensors)
        if scored and tensors:
            run.snapshots.check_scores(tensors, Path(reference))
        found = by_group(tensors, criterion) if scored else _ranked(run.architecture, tensors, criterion, Path(reference))
        if not found:
            raise LoftError(f"{reference} holds no filters of this network: give a snapshot or a model of a run")
        return found
    subject = open_subject(Path(reference))
    return _ranked(subject.architecture, subject.state, criterion, subject.path)
