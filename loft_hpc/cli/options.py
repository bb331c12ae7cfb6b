"""Options that several commands share. Each is named as the settings' field that it fills; defaults live there."""

import os
from collections.abc import Callable
from dataclasses import fields
from errno import EISDIR
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click
from click.core import ParameterSource

from loft_hpc.analysis.timing import EXAMPLES
from loft_hpc.cli.leave_out import leave_out_option
from loft_hpc.comm.engines import AUTO, ENGINES
from loft_hpc.comm.launch import announced_rank
from loft_hpc.data.catalogue import MAX_LOADER_WORKERS
from loft_hpc.data.registry import DATASET_NAMES, DataSettings
from loft_hpc.errors import LoftError
from loft_hpc.training.settings import (
    MAX_BATCH,
    MAX_EPOCHS,
    PRECISIONS,
    SCHEDULES,
    Checkpointing,
    Computation,
    Evaluation,
    Optimisation,
    Snapshots,
    Supervision,
)

Decorator = Callable[[Callable], Callable]

NEVER = 1_000_000
"""Epochs between evaluations where only the last one counts."""


def refuse_path(name: str | None) -> None:
    """Raises UsageError where --name is no name of a folder in its place; none at all is well."""
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise click.UsageError(f"--name '{name}' is no plain folder name")


def default(settings: type, name: str) -> Any:
    """A settings field's default, which is the option's too."""
    return next(field.default for field in fields(settings) if field.name == name)


def fill(settings: type, options: dict[str, Any], **nested: Any) -> Any:
    """Settings out of the options that carry their fields' names; a command that has no such option leaves the field its default."""
    given = options | nested
    return settings(**{field.name: given[field.name] for field in fields(settings) if field.name in given})


def several(*options: Decorator) -> Decorator:
    """One decorator out of many, in the order in which --help lists them."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def option(settings: type, name: str, help: str, **details: Any) -> Decorator:
    """An option --NAME for the field NAME of `settings`, with the field's default."""
    value = default(settings, name)
    shown = {"show_default": True} if value is not None else {}
    return click.option(f"--{name.replace('_', '-')}", name, default=value, help=help, **shown, **details)


data_options = several(
    option(DataSettings, "dataset", "Data set; digits and textures travel with their packages.", type=click.Choice(DATASET_NAMES)),
    option(
        DataSettings, "data_dir", "Folder with the files of fashion-mnist, cifar10, cifar100, imagenet or imagefolder.", type=click.Path()
    ),
    option(DataSettings, "image_size", "Pixels per side, for textures, synthetic, imagenet and imagefolder.", type=click.IntRange(8)),
    option(DataSettings, "download", "Fetch fashion-mnist, cifar10 or cifar100 into --data-dir first (rank 0 alone does).", is_flag=True),
    option(
        DataSettings, "loader_workers",
        "Processes per rank that decode image files.  [default: one less than the cores of a rank, at most 8]", type=click.IntRange(0),
    ),
    leave_out_option,
)  # fmt: skip

reading_options = several(
    click.option("--data-dir", type=click.Path(), help="Folder of the data set, where it is not the one that the run used."),
    click.option(
        "--loader-workers",
        type=click.IntRange(0, MAX_LOADER_WORKERS),
        help="Processes per rank that decode image files.  [default: the run's]",
    ),
)


def optimisation_options(lr: float = default(Optimisation, "lr")) -> Decorator:
    """Options of SGD, with a learning rate of the command's own as default."""
    return several(
        click.option("--lr", default=lr, show_default=True, type=float, help="Learning rate at the start."),
        option(Optimisation, "momentum", "Momentum of SGD.", type=float),
        option(Optimisation, "weight_decay", "Weight decay of SGD.", type=float),
        option(Optimisation, "schedule", "How the learning rate falls.", type=click.Choice(SCHEDULES)),
        click.option(
            "--milestone", "milestones", multiple=True, type=float, default=default(Optimisation, "milestones"), show_default=True,
            help="Fraction of the training at which --schedule step lowers the learning rate (repeat for more).",
        ),
        option(Optimisation, "decay", "Factor on the learning rate at each milestone.", type=float),
        option(Optimisation, "warmup", "How long the learning rate rises linearly at the start: 5ep, 500it (steps), or 0.", metavar="INTERVAL"),
    )  # fmt: skip


judging_options = several(
    option(Evaluation, "evaluation_batch", "Images per step when evaluating.", type=int),
    option(
        Evaluation, "statistics_batches", "Training batches over which BatchNorm statistics are re-estimated before evaluating.", type=int
    ),
    option(Evaluation, "statistics_batch", "Images in each of those batches.", type=int),
)
evaluation_options = several(
    option(Evaluation, "evaluate_every", "Epochs between evaluations (the last epoch always is evaluated).", type=int),
    judging_options,
)


PLOT_ENDINGS = (".png", ".pdf", ".svg")


def plot_option(help: str) -> Decorator:
    """--plot, the name of a PNG, PDF or SVG file, in a place that is tried before the work begins whose result it shows."""

    def check(context: click.Context, parameter: click.Parameter, name: str | None) -> Path | None:
        if name is None:
            return None
        if not name.lower().endswith(PLOT_ENDINGS):
            raise click.BadParameter(f"{name} must end in {', '.join(PLOT_ENDINGS[:-1])} or {PLOT_ENDINGS[-1]}", context, parameter)
        if announced_rank() == 0 and not context.resilient_parsing:  # the rank that draws; others may stand on machines without that folder
            refuse_unwritable(Path(name))
            if find_spec("matplotlib") is None:
                raise ModuleNotFoundError(name="matplotlib")
        return Path(name)

    return click.option("--plot", type=click.Path(), callback=check, help=f"PNG, PDF or SVG file, by its ending: {help}")


def refuse_unwritable(file: Path) -> None:
    """Raises LoftError where `file` could not be written as things stand. Nothing is left behind."""
    try:
        if file.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        folder = next(place for place in file.absolute().parents if os.path.lexists(place))
        with NamedTemporaryFile(prefix=f".{file.name}.", dir=folder):
            pass
    except OSError as problem:
        raise LoftError(f"{file} cannot be written ({problem.strerror or problem}): name another place for --plot") from None


def cluster_option(help: str) -> Decorator:
    """--cluster, a file of `loft_hpc.analysis.timing.Cluster`."""
    examples = ", ".join(sorted(file.stem for file in EXAMPLES.glob("*.toml")))
    return click.option("--cluster", "cluster_name", metavar="FILE", help=f"TOML file of a cluster, or an example ({examples}): {help}")


def snapshot_options(every: str = default(Snapshots, "snapshot_every")) -> Decorator:
    """Options of snapshots, with a command's own default interval."""
    return several(
        click.option(
            "--snapshot-every", default=every, show_default=True, metavar="INTERVAL",
            help="Between two snapshots: 1ep, 200it (steps of a worker), or 0 for the first and the last network alone.",
        ),
        click.option(
            "--snapshot-tensors/--no-snapshot-tensors", default=default(Snapshots, "snapshot_tensors"), show_default=True,
            help="Record the whole network in a snapshot, to draw tickets from, or the filters' norms and scales alone.",
        ),
    )  # fmt: skip


checkpoint_options = several(
    option(
        Checkpointing, "checkpoint_every",
        "Between two checkpoints: 1ep, 200it (steps of a worker), or 0 for none but at the end and when preempted.", metavar="INTERVAL",
    ),
    option(Checkpointing, "keep_checkpoints", "Checkpoints that are kept.", type=int),
)  # fmt: skip

supervision_options = several(
    option(
        Supervision, "stall_seconds", "End the job when a rank sends no heartbeat, or makes no progress, for so many seconds (0: never).",
        type=float,
    ),
    click.option(
        "--check-ranks/--no-check-ranks", default=default(Supervision, "check_ranks"), show_default=True,
        help="Compare what all ranks should hold alike, by a hash, after every round.",
    ),
)  # fmt: skip


def _use_engine(context: click.Context, parameter: click.Parameter, engine: str) -> None:
    if context.obj is not None:  # a command that is only read, as by loft plan, starts no ranks
        context.obj.engine = engine


engine_option = click.option(
    "--engine", type=click.Choice([AUTO, *ENGINES]), default=AUTO, show_default=True, expose_value=False, callback=_use_engine,
    help="What carries data between the ranks. auto: horovod where it is installed; else nccl where every rank has a "
    "GPU of its own, and mpi4py where not.",
)  # fmt: skip
device_option = several(
    option(Computation, "device", "Where to compute; auto takes a GPU if there is one.", type=click.Choice(["auto", "cpu", "cuda"])),
    engine_option,
)
batch_parts_option = click.option(
    "--batch-parts", type=click.IntRange(1, MAX_BATCH),
    help="Compute every batch in so many parts, each normalised by itself, so that the result does not depend on the number of ranks.  "
    "[default: one for each rank]",
)  # fmt: skip
arithmetic_options = several(
    option(
        Computation,
        "precision",
        "Arithmetic of convolutions; tf32 and bfloat16 need a GPU. auto: tf32 on a GPU, float32 on a CPU.",
        type=click.Choice(PRECISIONS),
    ),
    option(
        Computation,
        "compile",
        "Compile the network by torch.compile (needs a C++ compiler): the first steps take longer, later ones less on a GPU whose time "
        "goes into starting kernels. Rounding differs from an uncompiled run's.",
        is_flag=True,
    ),
)

run_options = several(
    click.option("--run", "run_path", type=click.Path(), help="Folder of the run.  [default: runs/MODEL-DATASET-STRATEGY+WORKERS-TIME]"),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with --run from its newest checkpoint, with its own settings; start it if it is not there yet.",
    ),
    click.option(
        "--extend-to", type=click.IntRange(1, MAX_EPOCHS), metavar="EPOCHS",
        help="With --resume of a finished run: train on to so many epochs. A constant rate goes on; a cosine or step schedule, which has "
        "ended, begins anew at --lr and runs over the added epochs (a warm restart, Loshchilov and Hutter 2017).",
    ),
)  # fmt: skip


def typed(context: click.Context) -> set[str]:
    """Names of the options that were given on the command line, not left at their defaults."""
    return {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
