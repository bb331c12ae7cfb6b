"""`--dry-run` of loft pretrain and loft retrain: the options that belong to it, and what it prints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from loft_hpc.analysis.timing import Cluster
from loft_hpc.analysis.traffic import Flow, delivered, handed_over
from loft_hpc.cli.context import Job, table
from loft_hpc.cli.options import cluster_option, several, typed
from loft_hpc.cli.units import bytes_text, duration_text, hours_text, number_text
from loft_hpc.data.registry import DataSettings, DataShape
from loft_hpc.jobs.dryrun import Choice, Plan, data_shape, plan, recipe
from loft_hpc.jobs.memory import RankMemory
from loft_hpc.jobs.prediction import Case, Outlook
from loft_hpc.training.settings import MAX_BATCH

MAX_WORKERS = 1_000_000
describing_options = several(
    click.option(
        "--classes", type=click.IntRange(1, MAX_WORKERS),
        help="With --images, describes a folder of images that is not there: number of classes.",
    ),
    click.option("--images", type=click.IntRange(1, MAX_BATCH), help="With --classes: number of training images."),
)  # fmt: skip
dry_run_options = several(
    click.option(
        "--dry-run", is_flag=True,
        help="Train and write nothing: print images, wall time and GPU-hours (--cluster), bytes, memory, recipe.",
    ),
    click.option(
        "--workers", type=click.IntRange(1, MAX_WORKERS),
        help="Number of ranks that --dry-run plans for.  [default: those launched]",
    ),
    cluster_option("--dry-run predicts times too."),
    describing_options,
)  # fmt: skip

BYTES_NOTE = (
    "Bytes, all workers together: handed over is what they upload, delivered what reaches them. "
    "Evaluations, start and control are not in it."
)
_SOURCES = {ParameterSource.COMMANDLINE: "typed", ParameterSource.DEFAULT_MAP: "preset"}
_MEMORY_LINES = {
    "parameters_bytes": "parameters",
    "gradients_bytes": "gradients",
    "momentum_bytes": "momentum",
    "statistics_bytes": "normalisation statistics",
    "exchange_bytes": "exchange buffers",
    "averaging_bytes": "averaging buffers",
    "mask_bytes": "mask of weights",
    "activations_bytes": "activations for the batch",
    "input_batch_bytes": "input batch",
    "next_batch_bytes": "next input batch, made ready meanwhile",
    "images_bytes": "data set",
    "initial_network_bytes": "initial network (host memory)",
    "evaluation_network_bytes": "full network for evaluations",
    "whole_bytes": "full network put together",
    "total_bytes": "total, at its largest",
    "staging_bytes": "pinned for exchanges without NCCL (host memory)",
    "host_bytes": "total in host memory",
}
_WHERE_IT_DIFFERS = {"mask_bytes", "next_batch_bytes", "staging_bytes", "host_bytes"}
"""Lines that are left out where they are 0."""


def wants_plan(context: click.Context) -> bool:
    """Whether this is a dry run. Raises UsageError for options that do not go with it, or not without it."""
    if context.params["dry_run"]:
        if context.params["resume"]:
            raise click.UsageError("--dry-run plans a training from its first step: omit --resume")
        if context.params["extend_to"] is not None:
            raise click.UsageError("--extend-to continues a finished run: omit --dry-run")
        return True
    strange = sorted(typed(context) & {"workers", "cluster_name", "classes", "images"})
    if strange:
        raise click.UsageError(f"--{strange[0].removesuffix('_name')} belongs to --dry-run")
    return False


@dataclass(frozen=True)
class Planned:
    """A dry run, with what is said about it."""

    what: str
    made: Plan
    cluster: Cluster | None
    known_from: str
    """Where the data's shape is known from."""
    assumed: bool
    """Whether nobody said how many workers, and one was launched."""

    @property
    def warning(self) -> str | None:
        return warning_line(self.made.choice, self.made.on_gpu)


def show_plan(
    context: click.Context,
    what: str,
    case: Callable[[DataShape], Case],
    data: DataSettings,
    found: frozenset[str] = frozenset(),
) -> None:
    """Plan, and print on rank 0.

    `what` names the training, and `case` makes it out of the shape of its `data`; the values of options in `found`
    come from the ticket where they are not typed.
    """
    job: Job = context.obj
    options = context.params
    launched = job.started_world.size if job.started_world else 1
    cluster = Cluster.read(options["cluster_name"]) if options["cluster_name"] else None
    shape, known_from = data_shape(data, options["classes"], options["images"])
    made = plan(case(shape), options["workers"] or launched, cluster)
    planned = Planned(what, made, cluster, known_from, assumed=options["workers"] is None and launched == 1)
    flags = {known.name: known.opts[0] for known in context.command.params}

    def source(name: str) -> str:
        return _SOURCES.get(context.get_parameter_source(name), "ticket" if name in found else "default")

    chosen = {
        name: {"value": value, "source": source(name)} for name, value in recipe(made).items() if name in flags
    }  # fmt: skip
    job.show(options["format"], _fields(planned, chosen), _text(planned, chosen, flags))


def _fields(planned: Planned, chosen: dict[str, dict]) -> dict[str, Any]:
    made, cluster = planned.made, planned.cluster
    way, loft, shape, choice = made.course, made.rounds is not None, made.case.shape, made.choice
    return {
        "recipe": chosen,
        "workers": made.workers,
        "images": way.images,
        "epoch_images": way.steps_per_epoch * way.step_images,
        "worker_seconds": choice.asked.worker_seconds,
        "beside": [outlook_fields(one) for one in choice.beside],
        "fewer_workers": choice.fewer and outlook_fields(choice.fewer),
        "warning": planned.warning,
        "data_classes": shape.num_classes,
        "data_train_images": shape.train_images,
        "data_known_from": planned.known_from,
        "parameters": made.divided.total,
        "partitioned_parameters": made.divided.partitioned,
        "shared_parameters": made.divided.shared,
        "steps_per_epoch": way.steps_per_epoch,
        "steps": way.steps,
        "rounds_per_epoch": way.steps_per_epoch / made.case.settings.loft.local_iterations if loft else None,
        "rounds": made.rounds,
        "exchanges": [
            {
                "unit": kind.unit,
                "count": kind.count,
                **_sizes(kind.flows, made.workers),
                "operations": [_operation(flow, made.workers) for flow in kind.flows],
            }
            for kind in way.exchanges
        ],
        "training": _sizes(way.flows, made.workers),
        "memory_device": "cuda" if made.on_gpu else "cpu",
        "memory": [_memory(memory) for memory in made.memories],
        "cluster": cluster and cluster.name,
        "epoch_seconds": made.epoch and made.epoch.total,
        "epoch_compute_seconds": made.epoch and made.epoch.compute,
        "epoch_not_hidden_seconds": made.epoch and made.epoch.communicate,
        "training_seconds": choice.asked.seconds,
        "notes": _notes(planned),
    }


def outlook_fields(one: Outlook) -> dict[str, Any]:
    possible = not one.impossible
    return {
        "options": one.options,
        "workers": one.workers,
        "images": one.images if possible else None,
        "seconds": one.seconds,
        "worker_seconds": one.worker_seconds,
        "payload_sent_bytes": one.handed_over_bytes if possible else None,
        "payload_received_bytes": one.delivered_bytes if possible else None,
        "wire_bytes": one.wire_bytes if possible else None,
        "impossible": one.impossible or None,
    }


def _sizes(flows: Sequence[Flow], workers: int) -> dict[str, float]:
    sent, received = handed_over(flows), delivered(flows)
    return {
        "payload_sent_bytes": sent,
        "payload_received_bytes": received,
        "payload_sent_bytes_per_rank": sent / workers,
        "payload_received_bytes_per_rank": received / workers,
        "wire_bytes": sum(flow.wire_bytes for flow in flows),
    }


def _operation(flow: Flow, workers: int) -> dict[str, Any]:
    return {"operation": flow.operation, "purpose": flow.purpose, **_sizes([flow], workers)}


def _memory(memory: RankMemory) -> dict[str, int]:
    own = {name: value for name, value in vars(memory).items() if type(value) is int and name != "rank"}
    lines = {**vars(memory.buffers), **own, "total": memory.total, "host": memory.host}
    return {"rank": memory.rank, **{key: lines[key.removesuffix("_bytes")] for key in _MEMORY_LINES}}


# -- for people ------------------------------------------------------------------------------------------------------


def worker_hours(on_gpu: bool) -> str:
    """What a worker's hours are called."""
    return "GPU-hours" if on_gpu else "worker-hours"


def workers_text(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"


def cost_text(one: Outlook, on_gpu: bool) -> str:
    """Wall time and GPU-hours of a training whose time is known."""
    return f"{duration_text(one.seconds)}, {hours_text(one.worker_seconds)} {worker_hours(on_gpu)}"


def warning_line(choice: Choice, on_gpu: bool, name: str = "") -> str | None:
    """That more workers hardly make it shorter, and what to do instead; None where they do."""
    fewer, better, asked = choice.fewer, choice.better, choice.asked
    if fewer is None:
        return None
    why = ", as every worker sees all images" if choice.sees_all else ""
    instead = [] if better is None else [f"{better.options} ({cost_text(better, on_gpu)})"]
    instead.append(f"{workers_text(fewer.workers)} ({cost_text(fewer, on_gpu)})")
    return (
        f"WARNING: {name}{workers_text(asked.workers)} take {duration_text(asked.seconds)} and "
        f"{workers_text(fewer.workers)} {duration_text(fewer.seconds)}: more workers hardly make it shorter{why}. "
        f"Use {' or '.join(instead)}."
    )


def outlook_table(rows: Sequence[tuple[str, Outlook]], first: str, on_gpu: bool) -> str:
    header = [first, "workers", "images (all workers)", "hours", worker_hours(on_gpu), "handed over", "delivered"]
    return table(header, [[name, *_outlook_row(one)] for name, one in rows])


def _outlook_row(one: Outlook) -> list[str]:
    if one.impossible:
        return [str(one.workers), *("-" for _ in range(5))]
    sizes = [bytes_text(size) for size in (one.handed_over_bytes, one.delivered_bytes)]
    return [str(one.workers), f"{one.images:,}", hours_text(one.seconds), hours_text(one.worker_seconds), *sizes]


def shape_text(shape: DataShape, known_from: str) -> str:
    size = f"{shape.image_size} x {shape.image_size} pixels"
    return f"{shape.train_images:,} training images of {shape.num_classes:,} classes, {size}, {known_from}"


def _answer(planned: Planned) -> list[str]:
    """The lines that come first."""
    made, cluster, choice = planned.made, planned.cluster, planned.made.choice
    way = made.course
    epochs = f"{way.epochs:,.4g} epochs of {way.steps_per_epoch * way.step_images:,}"
    seen = f"images of all workers together: {way.images:,} ({epochs})"
    if choice.sees_all:
        splits = "" if made.case.settings.rounds else ", and --shard-data splits them"
        seen += f"; each worker sees all images{splits}"
    predicted = f"{cost_text(choice.asked, made.on_gpu)}, predicted for {cluster.name}" if cluster else ""
    lines = [
        f"dry run: {planned.what} over {workers_text(made.workers)}; nothing is trained or written",
        seen,
        f"wall time: {predicted or '--cluster FILE tells it'}",
        f"data: {shape_text(made.case.shape, planned.known_from)}",
        *([planned.warning] if planned.warning else []),
    ]
    if choice.beside:
        rows = [("as asked", choice.asked), *((f"with {one.options}", one) for one in choice.beside)]
        lines += ["", outlook_table(rows, "", made.on_gpu)]
        lines += [f"-: {one.options}: {one.impossible}" for one in choice.beside if one.impossible]
    return lines


def _text(planned: Planned, chosen: dict[str, dict], flags: dict[str, str]) -> str:
    made, way = planned.made, planned.made.course
    settings, divided = made.case.settings, made.divided
    options = [[flags[name], _value(entry["value"]), entry["source"]] for name, entry in chosen.items()]
    sizes = [
        [f"{flow.operation} {flow.purpose}", f"{kind.count:,} {kind.unit}s", *_row(_sizes([flow], made.workers))]
        for kind in way.exchanges
        for flow in kind.flows
    ]
    sizes.append(["all", "training", *_row(_sizes(way.flows, made.workers))])
    steps = f"{way.steps_per_epoch:,} steps an epoch, {way.steps:,} in all"
    if made.rounds is not None:
        rounds = way.steps_per_epoch / settings.loft.local_iterations
        steps += f"; {rounds:,.1f} rounds an epoch, {made.rounds:,} in all"
    launch = f"mpirun -np {made.workers} with this command" if made.workers > 1 else "this command"
    return "\n".join(
        [
            *_answer(planned),
            "",
            f"{divided.total:,} parameters: {divided.partitioned:,} partitioned, {divided.shared:,} shared",
            steps,
            *([f"{number_text(made.epoch.total)} s an epoch"] if made.epoch else []),
            "",
            table(["option", "value", "from"], options),
            "",
            table(["bytes", "each of", "handed over", "a rank", "delivered", "a rank", "on the wire"], sizes),
            "",
            _memory_table(made),
            "",
            *_notes(planned),
            f"next: {launch}, without --dry-run and its options",
        ]
    )


def _value(value: Any) -> str:
    return "-" if value in (None, ()) else str(value)


def _memory_table(made: Plan) -> str:
    settings = made.case.settings
    memories = [_memory(memory) for memory in made.memories]
    types = {"activations_bytes": "bfloat16" if settings.computation.precision == "bfloat16" else "float32"}
    if settings.strategy == "loft":
        types |= dict.fromkeys(("exchange_bytes", "averaging_bytes"), settings.loft.transport_dtype)
    labels = {key: f"{label} ({types[key]})" if key in types else label for key, label in _MEMORY_LINES.items()}
    lines = [
        [label, *(memory_text(memory[key]) for memory in memories)]
        for key, label in labels.items()
        if key not in _WHERE_IT_DIFFERS or any(memory[key] for memory in memories)
    ]
    return table([f"memory on {_device(made)}", *(f"rank {memory['rank']}" for memory in memories)], lines)


def _device(made: Plan) -> str:
    return "a GPU" if made.on_gpu else "a CPU"


def _row(sizes: dict[str, float]) -> list[str]:
    columns = (
        "payload_sent_bytes",
        "payload_sent_bytes_per_rank",
        "payload_received_bytes",
        "payload_received_bytes_per_rank",
        "wire_bytes",
    )
    return [f"{sizes[column]:,.0f}" for column in columns]


def memory_text(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _notes(planned: Planned) -> list[str]:
    made, cluster, settings = planned.made, planned.cluster, planned.made.case.settings
    notes = [BYTES_NOTE + " A rank's are the mean over ranks."]
    if planned.assumed:
        notes.append("Planned for 1 rank, which is how many were launched: --workers S plans for S.")
    if settings.strategy == "loft" and settings.loft.exchange == "alltoall" and made.workers > 1:
        notes.append("What an all-to-all carries depends on how the filters are partitioned: its mean.")
    which = "every stage" if settings.strategy == "gpipe" else "rank 0, which no other exceeds"
    notes.append(
        f"Memory: of {which}, computing on {_device(made)}; float32 where no type is named. The total holds "
        "activations and input batches or the full network put together, whichever is more. Not in it: temporaries "
        "of kernels and of the backward pass, images that loaders hold ready, torch, MPI and Horovod themselves."
    )
    if made.on_gpu:
        notes.append("Host memory is not in the total: exchanges need it where Horovod has no NCCL or ranks share a GPU.")
    if cluster:
        notes.append(f"Times: alpha-beta model of {cluster.name} ({cluster.described}), without evaluations.")
    return notes
