"""`loft retrain`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option
from loft_hpc.cli.dryrun import dry_run_options, show_plan, wants_plan
from loft_hpc.cli.options import (
    arithmetic_options,
    batch_parts_option,
    checkpoint_options,
    device_option,
    evaluation_options,
    fill,
    optimisation_options,
    option,
    reading_options,
    run_options,
    snapshot_options,
    supervision_options,
    typed,
)
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress, ranks_text
from loft_hpc.cli.settings import for_run
from loft_hpc.data.registry import DATASET_NAMES, DataSettings, Reading
from loft_hpc.jobs.comparable import dense_ticket
from loft_hpc.jobs.dryrun import retraining
from loft_hpc.jobs.retrain import LEARNING_RATE, RetrainSettings, other_data, retrain, ticket_data
from loft_hpc.runs.run import Run
from loft_hpc.screen import tell
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots, Supervision
from loft_hpc.training.watching import Oversight

TICKETS_OWN = frozenset(("dataset", "data_dir", "image_size", "loader_workers"))
"""Options whose values are the ticket's where they are not given."""


def retraining_settings(context: click.Context, data: DataSettings) -> RetrainSettings:
    """The settings that the options of `loft retrain` say, on these data."""
    options = context.params
    return fill(
        RetrainSettings,
        options,
        transfer=options["dataset"] is not None,
        data=data,
        optimisation=fill(Optimisation, options),
        evaluation=fill(Evaluation, options),
        computation=fill(Computation, options),
        snapshots=fill(Snapshots, options),
        checkpoints=fill(Checkpointing, options),
    )


@click.command("retrain")
@click.argument("ticket", type=click.Path())
@preset_option("retrain")
@click.option("--dense", is_flag=True, help="TICKET is a pretraining run: retrain its dense network, to compare tickets with.")
@option(
    RetrainSettings,
    "rewind",
    "Weights to start from: none (as pruned), init (before pretraining), epoch:K or step:K (a snapshot).",
    type=str,
)
@reading_options
@click.option(
    "--dataset",
    type=click.Choice(DATASET_NAMES),
    help="Data set to retrain on, where it is not the ticket's own: the classifier is initialised anew where the classes differ.",
)
@option(DataSettings, "image_size", "Pixels per side of --dataset.", type=click.IntRange(8))
@option(DataSettings, "download", "Fetch --dataset into --data-dir first (rank 0 alone does).", is_flag=True)
@option(RetrainSettings, "new_classifier", "Draw the classifier anew in any case, from --seed.", is_flag=True)
@option(RetrainSettings, "epochs", "Passes over the training images, which the ranks share.", type=int)
@option(RetrainSettings, "batch_size", "Images per step of all ranks together.", type=int)
@batch_parts_option
@optimisation_options(lr=LEARNING_RATE)
@option(RetrainSettings, "seed", "Decides data order and augmentation.", type=int)
@snapshot_options("0")
@checkpoint_options
@evaluation_options
@supervision_options
@device_option
@arithmetic_options
@run_options
@dry_run_options
@format_option
@click.pass_context
def command(
    context: click.Context, ticket: str, dense: bool, dataset: str | None, run_path: str | None, resume: bool,
    extend_to: int | None, format: str, **options: Any,
) -> None:  # fmt: skip
    """Train TICKET, the physically smaller network, data-parallel over all ranks, on the data that it was found on, or on --dataset.

    Examples: mpirun -np 4 loft retrain runs/RUN/tickets/magnitude-l2-0.8

    loft retrain runs/RUN/tickets/magnitude-l2-0.8 --dataset imagefolder --data-dir flowers

    mpirun -np 4 loft retrain runs/RUN --dense
    """
    job: Job = context.obj
    if dataset is None and (strange := sorted(typed(context) & {"image_size", "download"})):
        raise click.UsageError(f"--{strange[0].replace('_', '-')} belongs to --dataset")
    # The options first: their mistakes are told without reading a file.
    retraining_settings(context, DataSettings())
    supervision = fill(Supervision, options)
    planning = wants_plan(context)
    job.join()
    source = dense_ticket(Run.open(Path(ticket))) if dense else Ticket.read(Path(ticket))
    if dataset is None:
        data = ticket_data(source).read(fill(Reading, options))
    else:
        given = {name: options[name] for name in ("data_dir", "loader_workers", "image_size", "download")}
        data = other_data(source, dataset, **given)
    given = retraining_settings(context, data)
    if planning:
        what = f"retraining {ticket} on {data.label}"
        show_plan(context, what, partial(retraining, source, given), data, TICKETS_OWN)
        return
    path = Path(run_path) if run_path else None
    settings = for_run(given, "retrain", typed(context), path, resume, extend_to)
    world = job.world
    speaks = world.rank == 0 and format == "table"
    if speaks:
        tell(f"retraining {ticket} on {data.label} over {ranks_text(world)}")
    progress = Progress(speaks)
    path, outcome = retrain(source, settings, path, resume, world, Oversight(progress, job.interruption, supervision))
    score = outcome.score
    fields = {
        "run": str(path),
        "ticket": ticket,
        "accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
        "wall_seconds": outcome.wall_seconds,
        "notes": progress.notes,
    }
    what = "dense network" if dense else "ticket"
    lines = [f"test accuracy of the {what}: {100 * score.accuracy:.2f} % ({score.correct} of {score.images})", f"run: {path}"]
    lines.append(
        f"next: loft compare {path} TICKETS"
        if dense
        else f"next: loft check {ticket}     # is it a winning ticket? The trained network: loft export {path}"
    )
    job.show(format, fields, "\n".join(lines))
