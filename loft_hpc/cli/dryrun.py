"""`loft pretrain --dry-run`: the options that belong to it, and what it prints."""

from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from loft_hpc.analysis.timing import Cluster
from loft_hpc.analysis.traffic import Flow, delivered, handed_over
from loft_hpc.cli.context import Job, table
from loft_hpc.cli.options import cluster_option, several, typed
from loft_hpc.jobs.dryrun import Plan, plan, recipe
from loft_hpc.jobs.memory import RankMemory
from loft_hpc.jobs.pretrain import PretrainSettings

MAX_WORKERS = 1_000_000
dry_run_options = several(
    click.option("--dry-run", is_flag=True, help="Print the resolved recipe, bytes, memory and (--cluster) time; nothing is read or written."),
    click.option("--workers", type=click.IntRange(1, MAX_WORKERS), help="Number of ranks that --dry-run plans for.  [default: those launched]"),
    cluster_option("--dry-run predicts times too."),
)  # fmt: skip

_SOURCES = {ParameterSource.COMMANDLINE: "typed", ParameterSource.DEFAULT_MAP: "preset"}
_MEMORY_LINES = {
    "parameters_bytes": "parameters",
    "gradients_bytes": "gradients",
    "momentum_bytes": "momentum",
    "statistics_bytes": "normalisation statistics",
    "exchange_bytes": "exchange buffers",
    "averaging_bytes": "averaging buffers",
    "activations_bytes": "activations for the batch",
    "input_batch_bytes": "input batch",
    "images_bytes": "data set",
    "initial_network_bytes": "initial network (host memory)",
    "evaluation_network_bytes": "full network for evaluations",
    "whole_bytes": "full network put together",
    "total_bytes": "total, at its largest",
}


def wants_plan(context: click.Context) -> bool:
    """Whether this is a dry run. Raises UsageError for options that do not go with it, or not without it."""
    if context.params["dry_run"]:
        if context.params["resume"]:
            raise click.UsageError("--dry-run plans a training from its first step: omit --resume")
        if context.params["extend_to"] is not None:
            raise click.UsageError("--extend-to goes on with a finished run: omit --dry-run")
        return True
    strange = sorted(typed(context) & {"workers", "cluster_name"})
    if strange:
        raise click.UsageError(f"--{strange[0].removesuffix('_name')} belongs to --dry-run")
    return False


def show_plan(context: click.Context, settings: PretrainSettings) -> None:
    """Plan, and print on rank 0."""
    job: Job = context.obj
    options = context.params
    launched = job.started_world.size if job.started_world else 1
    cluster = Cluster.read(options["cluster_name"]) if options["cluster_name"] else None
    made = plan(settings, options["workers"] or launched, cluster)
    sources = {name: _SOURCES.get(context.get_parameter_source(name), "default") for name in options}
    chosen = {name: {"value": value, "source": sources[name]} for name, value in recipe(made).items()}
    flags = {known.name: known.opts[0] for known in context.command.params}
    notes = _notes(made, cluster, assumed=options["workers"] is None and launched == 1)
    job.show(options["format"], {"recipe": chosen, **_fields(made, cluster), "notes": notes}, _text(made, chosen, flags, notes))


def _fields(made: Plan, cluster: Cluster | None) -> dict[str, Any]:
    way, loft = made.course, made.rounds is not None
    local = made.settings.loft.local_iterations
    return {
        "workers": made.workers,
        "parameters": made.divided.total,
        "partitioned_parameters": made.divided.partitioned,
        "shared_parameters": made.divided.shared,
        "steps_per_epoch": way.steps_per_epoch,
        "steps": way.steps,
        "rounds_per_epoch": way.steps_per_epoch / local if loft else None,
        "rounds": made.rounds,
        "exchanges": [
            {"unit": kind.unit, "count": kind.count, **_sizes(kind.flows, made.workers), "operations": [_operation(flow, made.workers) for flow in kind.flows]}
            for kind in way.exchanges
        ],
        "training": _sizes(way.flows, made.workers),
        "memory_device": "cuda" if made.on_gpu else "cpu",
        "memory": [_memory(memory) for memory in made.memories],
        "cluster": cluster and cluster.name,
        "epoch_seconds": made.epoch and made.epoch.total,
        "epoch_compute_seconds": made.epoch and made.epoch.compute,
        "epoch_not_hidden_seconds": made.epoch and made.epoch.communicate,
        "training_seconds": made.training_seconds,
    }  # fmt: skip


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
    own = {name: value for name, value in vars(memory).items() if isinstance(value, int) and name != "rank"}
    lines = {f"{name}_bytes": value for name, value in {**vars(memory.buffers), **own, "total": memory.total}.items()}
    return {"rank": memory.rank, **{key: lines[key] for key in _MEMORY_LINES}}


def _text(made: Plan, chosen: dict[str, dict], flags: dict[str, str], notes: Sequence[str]) -> str:
    settings, way = made.settings, made.course
    options = [
        [flags[name], "-" if entry["value"] in (None, ()) else str(entry["value"]), entry["source"]] for name, entry in chosen.items()
    ]
    sizes = [
        [f"{flow.operation} {flow.purpose}", f"{kind.count:,} {kind.unit}s", *_row(_sizes([flow], made.workers))]
        for kind in way.exchanges
        for flow in kind.flows
    ]
    sizes.append(["all", "training", *_row(_sizes(way.flows, made.workers))])
    memories = [_memory(memory) for memory in made.memories]
    types = {"activations_bytes": settings.computation.precision}
    if settings.strategy == "loft":
        types |= dict.fromkeys(("exchange_bytes", "averaging_bytes"), settings.loft.transport_dtype)
    labels = {key: f"{label} ({types[key]})" if key in types else label for key, label in _MEMORY_LINES.items()}
    lines = [[label, *(_binary(memory[key]) for memory in memories)] for key, label in labels.items()]
    steps = f"{way.steps_per_epoch:,} steps an epoch, {way.steps:,} in all"
    if made.rounds is not None:
        steps += f"; {way.steps_per_epoch / settings.loft.local_iterations:,.1f} rounds an epoch, {made.rounds:,} in all"
    return "\n".join(
        [
            f"dry run: {settings.model} on {settings.data.label} with {settings.strategy} over {made.workers} rank{'s' * (made.workers > 1)}",
            f"{made.divided.total:,} parameters: {made.divided.partitioned:,} partitioned, {made.divided.shared:,} shared",
            steps,
            "",
            table(["option", "value", "from"], options),
            "",
            table(["bytes", "each of", "handed over", "a rank", "delivered", "a rank", "on the wire"], sizes),
            "",
            table(["memory", *(f"rank {memory['rank']}" for memory in memories)], lines),
            "",
            *([f"predicted: {made.epoch.total:.4g} s an epoch, {made.training_seconds:.4g} s in all"] if made.epoch else []),
            *notes,
        ]
    )


def _row(sizes: dict[str, float]) -> list[str]:
    columns = (
        "payload_sent_bytes",
        "payload_sent_bytes_per_rank",
        "payload_received_bytes",
        "payload_received_bytes_per_rank",
        "wire_bytes",
    )
    return [f"{sizes[column]:,.0f}" for column in columns]


def _binary(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _notes(made: Plan, cluster: Cluster | None, assumed: bool) -> list[str]:
    settings = made.settings
    notes = ["Bytes: a rank's are the mean over ranks. Without evaluations, start and control."]
    if assumed:
        notes.append("Planned for 1 rank, which is how many were launched: --workers S plans for S.")
    if settings.strategy == "loft" and settings.loft.exchange == "alltoall" and made.workers > 1:
        notes.append("What an all-to-all carries depends on the deals: its average.")
    which = "every stage" if settings.strategy == "gpipe" else "rank 0, which no other exceeds"
    device = "a GPU" if made.on_gpu else "a CPU"
    notes.append(
        f"Memory: of {which}, computing on {device}; float32 where no type is named. The total holds activations and input batch or the full network put together, whichever is more. "
        "Not in it: temporaries of kernels and of the backward pass, images that loaders hold ready, torch, MPI and Horovod themselves."
    )
    if made.on_gpu:
        notes.append("Pinned host memory that exchanges go through where Horovod has no NCCL is not in it either.")
    if cluster:
        notes.append(f"Times: alpha-beta model of {cluster.name}, without evaluations (see loft commcost).")
    else:
        notes.append("Times: --cluster FILE predicts them.")
    return notes
