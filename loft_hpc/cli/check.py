"""`loft check`."""

from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import (
    NEVER,
    batch_parts_option,
    device_option,
    fill,
    judging_options,
    optimisation_options,
    option,
    precision_option,
    reading_options,
    refuse_path,
)
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress
from loft_hpc.cli.pruning import emptied_line
from loft_hpc.data.registry import DataSettings, Reading
from loft_hpc.jobs.check import CONTROLS, DENSE, TICKET, CheckSettings, check, to_fields
from loft_hpc.jobs.retrain import LEARNING_RATE, RetrainSettings, ticket_data
from loft_hpc.screen import tell
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots, Supervision
from loft_hpc.training.watching import Oversight


class CheckProgress:
    """Rank 0 tells of its own trainings."""

    def __init__(self, speaks: bool):
        self._speaks = speaks

    def trained(self, variant: str, seed: int, accuracy: float, done: int, of: int) -> None:
        if self._speaks:
            tell(f"{done:>3}/{of} of this rank's   {variant}, seed {seed}: {100 * accuracy:.2f} %")


@click.command("check")
@click.argument("ticket", type=click.Path())
@preset_option("retrain")
@option(CheckSettings, "seeds", "Trainings of the ticket, of the dense network and of each control.", type=int)
@option(CheckSettings, "xi", "Percentage points by which a winning ticket may stay behind the dense network.", type=float)
@option(RetrainSettings, "rewind", "Weights to start from: none (the ticket's), init, epoch:K or step:K.", type=str)
@reading_options
@option(RetrainSettings, "epochs", "Walks through the training images, of each training.", type=int)
@option(RetrainSettings, "batch_size", "Images per step.", type=int)
@batch_parts_option
@optimisation_options(lr=LEARNING_RATE)
@judging_options
@device_option
@precision_option
@option(CheckSettings, "name", "Folder under TICKET/checks: one for each recipe.", type=str)
@format_option
@click.pass_context
def command(context: click.Context, ticket: str, format: str, **options: Any) -> None:
    """Is TICKET a winning one? Retrains it, the dense network and controls with one budget, over several seeds.

    Controls: the mask shuffled within each layer; the surviving weights drawn anew; the lowest scores in place of the highest; a random
    ticket of as many units whose densities know nothing of this one's (of whole blocks, shuffled ones are that). Each rank trains by itself, so give as many ranks as there are cores
    to spare. What is done is not done again: give the same command after an interruption, or with more --seeds.

    Example: mpirun -np 4 loft check runs/RUN/tickets/gem-miner-seed0-0.95 --epochs 10
    """
    job: Job = context.obj
    settings = fill(CheckSettings, options)
    refuse_path(settings.name)
    parts = {
        "optimisation": fill(Optimisation, options),
        "evaluation": fill(Evaluation, options | {"evaluate_every": NEVER}),
        "computation": fill(Computation, options),
        "snapshots": Snapshots(snapshot_every="0"),
        "checkpoints": Checkpointing(checkpoint_every="0"),
    }

    def recipe(source: Ticket) -> RetrainSettings:
        return fill(RetrainSettings, options | {"seed": 0}, data=ticket_data(source).read(fill(Reading, options)), **parts)

    fill(RetrainSettings, options | {"seed": 0}, data=DataSettings(), **parts)  # mistakes in the options, before a file is read
    job.join()
    quiet = Oversight(Progress(False), job.interruption, Supervision())
    checked = check(Path(ticket), settings, recipe, job.world, CheckProgress(job.speaks and format == "table"), quiet)
    names = {TICKET: "the ticket", DENSE: "the dense network"} | CONTROLS
    rows = [
        [variant.name, names[variant.name], _interval(100 * variant.mean, 100 * variant.half_width, "{:.2f}"),
         "" if variant.name == TICKET else _interval(variant.advantage, variant.advantage_half_width, "{:+.2f}")]
        for variant in checked.variants
    ]  # fmt: skip
    header = ["variant", "what it is", "accuracy, %", "the ticket is ahead by, points"]
    emptied = [emptied_line(f"{ticket} ({name})", layers) for name, layers in checked.emptied.items()]
    notes = f"{100 * checked.pruning_ratio:.4g} % pruned; {settings.seeds} seeds; 95 % intervals (Student), differences seed by seed"
    if checked.note:
        notes += f"\nnote: {checked.note}"
    job.show(
        format,
        {"ticket": ticket, **to_fields(checked)},
        "\n".join([table(header, rows), notes, *emptied, f"verdict: {checked.verdict} ({checked.why})"]),
    )


def _interval(value: float, half: float, form: str) -> str:
    return form.format(value) + (f" +- {half:.2f}" if half == half else "")
