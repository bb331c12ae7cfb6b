"""`loft pretrain`."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option
from loft_hpc.cli.dryrun import dry_run_options, show_plan, wants_plan
from loft_hpc.cli.options import (
    arithmetic_options,
    checkpoint_options,
    data_options,
    default,
    device_option,
    evaluation_options,
    fill,
    optimisation_options,
    option,
    run_options,
    several,
    snapshot_options,
    supervision_options,
    typed,
)
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress, ranks_text
from loft_hpc.cli.settings import for_run
from loft_hpc.data.registry import DataSettings
from loft_hpc.filterwise.emergence import RULES, Stopping
from loft_hpc.filterwise.exchange import EXCHANGES, TRANSPORT_DTYPES
from loft_hpc.filterwise.loft import MOMENTUM_RULES, LoftSettings
from loft_hpc.jobs.prediction import Case
from loft_hpc.jobs.pretrain import STRATEGIES, PretrainSettings, pretrain
from loft_hpc.jobs.settings import flatten
from loft_hpc.jobs.stops import stability, stability_fields, stability_sentence
from loft_hpc.models.architecture import MODEL_NAMES
from loft_hpc.models.groups import PARTITION_RULES
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.runs.run import Run
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots, Supervision
from loft_hpc.training.watching import Oversight

EPOCHS_HELP = (
    "Passes over the training images. Under loft each worker sees all images once per epoch: N workers see N times as "
    "many; --shard-data splits them."
)
loft_options = several(
    option(LoftSettings, "local_iterations", "SGD steps of a worker between two exchanges.", type=int),
    option(LoftSettings, "partition", "Blocks whose filters are partitioned over the ranks: the paper's (not stage 1, not strided blocks) or all.", type=click.Choice(PARTITION_RULES)),
    option(LoftSettings, "partition_unit", "Ranks hold multiples of so many filters of a block where its width allows it; GPUs are fastest with multiples of 8.", type=int),
    option(LoftSettings, "exchange", "How filters reach the rank that trains them next: allgather sends all to every rank, alltoall each to that rank alone.", type=click.Choice(list(EXCHANGES))),
    option(LoftSettings, "average_every", "Rounds between two averagings of the parameters that all ranks share (an epoch's end always averages).", type=int),
    option(LoftSettings, "transport_dtype", "Type in which parameters are sent; every rank keeps float32.", type=click.Choice(list(TRANSPORT_DTYPES))),
    option(LoftSettings, "momentum_across_rounds", "Momentum at the start of a round: zero (reset), or sent with its parameters (carry).", type=click.Choice(MOMENTUM_RULES)),
    click.option(
        "--shard-data/--no-shard-data", default=default(LoftSettings, "shard_data"), show_default=True,
        help="Split every epoch's images over the ranks, or let each rank see all of them in an order of its own.",
    ),
)  # fmt: skip

_own_limits = "  [default: {}]".format(", ".join(f"{{}} for {rule}" for rule in RULES))
stopping_options = several(
    option(Stopping, "stop_when_stable", "End pretraining when the rankings of the filters are stable from snapshot to snapshot, and have left the initial ones.", is_flag=True),
    option(Stopping, "stability", "What must be stable: the distance of rankings, or Early-Bird's masks by BatchNorm scale.", type=click.Choice(list(RULES))),
    option(Stopping, "stable_ratio", "Pruning ratio of the ticket in view: the ranking of the filters that it keeps must be stable.", type=float),
    option(Stopping, "tolerance", "Distance up to which they count as stable: 0 the same, 1 as far as random rankings (masks: share that differs)." + _own_limits.format(*(tolerance for tolerance, _ in RULES.values())), type=float),
    option(Stopping, "patience", "Number of stable snapshots in a row." + _own_limits.format(*(patience for _, patience in RULES.values())), type=int),
)  # fmt: skip

pipeline_options = several(
    option(PipelineSettings, "micro_batches", "Micro-batches that gpipe cuts each batch into.", type=int),
    option(
        PipelineSettings, "split", "Where gpipe cuts the network: stages, balanced (by FLOPs), or after these blocks: 3,7,13.", type=str
    ),
    option(PipelineSettings, "recompute", "Compute activations again for gpipe's backward pass, in place of keeping them.", is_flag=True),
)


def settings_of_options(context: click.Context) -> PretrainSettings:
    """The settings that the options say. Raises UsageError or LoftError for those that contradict one another."""
    options = dict(context.params)
    if options["weights"] is not None:
        options["weights"] = os.path.abspath(options["weights"])  # a run goes on from any folder
    given = fill(
        PretrainSettings,
        options,
        data=fill(DataSettings, options),
        loft=fill(LoftSettings, options),
        pipeline=fill(PipelineSettings, options),
        optimisation=fill(Optimisation, options),
        evaluation=fill(Evaluation, options),
        computation=fill(Computation, options),
        snapshots=fill(Snapshots, options),
        checkpoints=fill(Checkpointing, options),
        stopping=fill(Stopping, options),
    )
    if given.rounds is not None and "epochs" in typed(context):
        raise click.UsageError("give --epochs or --rounds, not both")
    for owner, own in (("loft", given.loft), ("gpipe", given.pipeline)):
        strange = sorted(typed(context) & set(flatten(own))) if given.strategy != owner else []
        if strange:
            raise click.UsageError(f"--{strange[0].replace('_', '-')} belongs to --strategy {owner}")
    strange = sorted(typed(context) & set(flatten(given.stopping)) - {"stop_when_stable", "stable_ratio"})
    if strange and not given.stopping.stop_when_stable:
        raise click.UsageError(f"--{strange[0].replace('_', '-')} belongs to --stop-when-stable")
    return given


@click.command("pretrain")
@preset_option("pretrain")
@option(PretrainSettings, "strategy", "How the ranks train together.", type=click.Choice(STRATEGIES))
@option(PretrainSettings, "model", f"Residual network: {', '.join(MODEL_NAMES)}.", type=click.Choice(MODEL_NAMES), metavar="MODEL")
@option(PretrainSettings, "widen", "Hidden filters as a multiple of the stage's width.  [default: 2 for wideresnet, else 1]", type=float)
@option(
    PretrainSettings,
    "weights",
    "Start from the parameters in this safetensors file: a run's network or snapshot, or torchvision's resnet18 or resnet34 (images over 64 pixels).",
    type=click.Path(),
)
@option(PretrainSettings, "new_classifier", "Draw the classifier from the seed, whatever --weights has.", is_flag=True)
@data_options
@option(PretrainSettings, "epochs", EPOCHS_HELP, type=int)
@option(PretrainSettings, "rounds", "Rounds of --local-iterations steps, in place of --epochs.", type=int)
@option(
    PretrainSettings, "batch_size", "Images per step: of each worker under loft, of all together under data-parallel and gpipe.", type=int
)
@loft_options
@pipeline_options
@optimisation_options()
@option(PretrainSettings, "seed", "Decides initialisation, partitions, data order and augmentation.", type=int)
@snapshot_options()
@stopping_options
@checkpoint_options
@evaluation_options
@supervision_options
@device_option
@arithmetic_options
@run_options
@dry_run_options
@format_option
@click.pass_context
def command(context: click.Context, run_path: str | None, resume: bool, extend_to: int | None, format: str, **options: Any) -> None:
    """Train a network over all ranks so that its winning ticket can be drawn from it.

    With --strategy loft every rank trains a narrow sub-network that holds a random share of the hidden filters; after
    --local-iterations steps the ranks exchange them, and the filters are reassigned to the ranks at random. The baselines: data-parallel
    (every rank trains the whole network on a part of each batch) and gpipe (every rank holds a part of the network, and batches pass
    through them in micro-batches).

    Example: mpirun -np 4 loft pretrain --model resnet34
    """
    job: Job = context.obj
    given = settings_of_options(context)
    path = Path(run_path) if run_path else None
    supervision = fill(Supervision, options)
    planning = wants_plan(context)
    job.join()
    if planning:
        what = f"{given.model} on {given.data.label} with {given.strategy}"
        show_plan(context, what, partial(Case.of, given), given.data)
        return
    settings = for_run(given, "pretrain", typed(context), path, resume, extend_to)
    world = job.world
    speaks = world.rank == 0 and format == "table"
    ranks = ranks_text(world)
    title = f"pretraining {settings.model} on {settings.data.label} with {settings.strategy} over {ranks}"
    oversight = Oversight(Progress(speaks, title), job.interruption, supervision)
    path, outcome = pretrain(settings, path, resume, world, oversight)
    score = outcome.score
    fields = {
        "run": str(path),
        "accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
        "wall_seconds": outcome.wall_seconds,
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "synthetic_data": settings.data.synthetic,
    }
    stable = world.on_root(lambda: stability(Run.open(path)))
    fields["stability"] = stability_fields(stable)
    merged = "merged network" if settings.strategy == "loft" and world.size > 1 else "network"
    text = f"test accuracy of the {merged}: {100 * score.accuracy:.2f} % ({score.correct} of {score.images})"
    lines = [text, *([] if stable is None else [stability_sentence(stable)])]
    if settings.strategy == "loft" and world.size == 1:
        lines.append(
            "note: one rank alone trains the whole network: ordinary training, no filters were exchanged (mpirun -np 4 loft pretrain)"
        )
    job.show(format, fields, "\n".join([*lines, f"run: {path}", f"next: loft prune {path}"]))
