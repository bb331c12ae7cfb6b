"""`loft check`."""

import re
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import (
    NEVER,
    arithmetic_options,
    batch_parts_option,
    device_option,
    fill,
    judging_options,
    optimisation_options,
    option,
    reading_options,
    refuse_path,
)
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress
from loft_hpc.cli.pruning import emptied_line
from loft_hpc.data.registry import DataSettings, Reading
from loft_hpc.jobs.check import CONTROLS, TESTS, CheckSettings, check, folder_of, to_fields
from loft_hpc.jobs.comparable import start_text
from loft_hpc.jobs.retrain import LEARNING_RATE, RetrainSettings, ticket_data
from loft_hpc.jobs.stops import LEFT, stability, stability_sentence
from loft_hpc.jobs.verdicts import DENSE, MOST_SEEDS, OPEN, RULE, TICKET, WINNING, Comparison, Verdict
from loft_hpc.runs.run import Run
from loft_hpc.screen import tell
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots, Supervision
from loft_hpc.training.watching import Oversight

MANY_SEEDS = 20
"""Beyond which more epochs are advised as well as more seeds."""


class CheckProgress:
    """Rank 0 tells of its own trainings."""

    def __init__(self, speaks: bool):
        self._speaks = speaks

    def trained(self, variant: str, seed: int, accuracy: float, done: int, of: int) -> None:
        if self._speaks:
            tell(f"{done:>3}/{of} of this rank's   {variant}, seed {seed}: {100 * accuracy:.2f} %")


def _rewind(context: click.Context, parameter: click.Parameter, test: str) -> str:
    """A test's name as `RetrainSettings.rewind`."""
    if test not in TESTS and not re.fullmatch(r"(epoch|step):\d{1,9}", test):
        raise click.BadParameter(f"'{test}' is none: choose {', '.join(TESTS)}, epoch:K or step:K", context, parameter)
    return TESTS.get(test, test)


@click.command("check")
@click.argument("ticket", type=click.Path())
@preset_option("retrain")
@option(CheckSettings, "seeds", "Trainings of the ticket, of the dense network and of each control.", type=int)
@option(
    CheckSettings,
    "xi",
    "Percentage points that make no difference: a winning ticket may stay so far behind the dense network.",
    type=float,
)
@click.option(
    "--test",
    "rewind",
    default="practical",
    show_default=True,
    metavar="TEST",
    callback=_rewind,
    help="practical: from the weights that the ticket has; classical: all rewound to the initialisation, as in the lottery ticket "
    "hypothesis; epoch:K, step:K: rewound to a snapshot.",
)
@reading_options
@option(RetrainSettings, "epochs", "Passes over the training images, of each training.", type=int)
@option(RetrainSettings, "batch_size", "Images per step.", type=int)
@batch_parts_option
@optimisation_options(lr=LEARNING_RATE)
@judging_options
@device_option
@arithmetic_options
@click.option(
    "--name",
    help="Folder under TICKET/checks: one for each recipe.  [default: the test's name; `default` for practical]",
)
@format_option
@click.pass_context
def command(context: click.Context, ticket: str, format: str, **options: Any) -> None:
    """Is TICKET a winning one? Retrains it, the dense network and controls alike, over several seeds.

    Controls: random units, as many in every layer (shuffled); the same units with new random weights (reinitialised); the lowest scores
    in place of the highest (inverted); random units of as many parameters, at densities that do not know the ticket's (random).

    The verdict, at 95 % confidence from differences seed by seed. better than random: ahead of every control. winning: also at most --xi
    points behind the dense network, which had the same start and the same training. no better than random: for sure less than --xi points
    ahead of one of the controls. inconclusive: anything else; the number of seeds that would settle it is said.

    Each rank trains by itself, so give as many ranks as there are cores to spare. What is done is not done again: give the same command
    after an interruption, or with more --seeds. loft compare takes the trainings under TICKET/checks.

    Example: mpirun -np 4 loft check runs/RUN/tickets/gem-miner-seed0-0.95 --epochs 10
    """
    job: Job = context.obj
    settings = fill(CheckSettings, options | {"name": options["name"] or folder_of(options["rewind"])})
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
    names = {TICKET: "the ticket", DENSE: "the dense network, from the same start"} | CONTROLS
    dense = next(variant.size for variant in checked.variants if variant.name == DENSE)
    compared = {one.name: one for one in checked.verdict.comparisons}
    rows = [
        [
            variant.name,
            f"{100 * variant.size.parameters / dense.parameters:.1f}",
            f"{100 * variant.size.flops / dense.flops:.1f}",
            _interval(100 * variant.mean, 100 * variant.half_width, "{:.2f}"),
            *_ahead(compared.get(variant.name)),
            names[variant.name],
        ]
        for variant in checked.variants
    ]
    header = ["network", "parameters, %", "FLOPs, %", "accuracy, %", "ticket ahead by, points", "passed", "what it is"]
    notes = [emptied_line(f"{ticket} ({variant.name})", variant.emptied) for variant in checked.variants if variant.emptied]
    if settings.seeds < 3:
        notes.append(f"note: {settings.seeds} seed{'s' * (settings.seeds > 1)} cannot tell much: give 3 or more")
    if unmoved := _unmoved(Path(ticket), job):
        notes.append(f"note: {unmoved}")
    if checked.note:
        notes.append(f"note: {checked.note}")
    epochs = options["epochs"]
    lines = [
        f"verdict: {checked.verdict.name} ({checked.verdict.why})",
        f"{ticket}, {100 * checked.pruning_ratio:.4g} % pruned: every network retrained for {epochs} epoch{'s' * (epochs > 1)} from "
        f"{start_text(checked.start)}, {settings.seeds} seed{'s' * (settings.seeds > 1)}",
        table(header, rows, left=(0, 6)),
        f"{RULE} ({settings.xi:g}); +-: 95 % interval (Student).",
        *notes,
        next_step(ticket, checked.verdict, settings),
    ]
    job.show(format, {"ticket": ticket, **to_fields(checked)}, "\n".join(lines))


def _unmoved(ticket: Path, job: Job) -> str | None:
    """What the ticket's run says of its rankings, where they have not left the initial ones."""

    def look() -> str | None:
        found = stability(Run.open(ticket.parent.parent)) if (ticket.parent.parent / "run.json").is_file() else None
        return stability_sentence(found) if found and found.epoch is None and found.from_initial <= LEFT else None

    return job.world.on_root(look)


def next_step(ticket: str, verdict: Verdict, settings: CheckSettings) -> str:
    if verdict.name == WINNING:
        return f"next: loft retrain {ticket}, and loft export of its run"
    needed = verdict.seeds_needed or 0
    if any(one.passed == OPEN for one in verdict.comparisons) and needed <= MOST_SEEDS:
        more = f"next: the same command with --seeds {max(needed, settings.seeds + 2)}; what is trained is kept"
        if needed > MANY_SEEDS:
            more += ". So many seeds may mean too little training: more --epochs, with another --name, may tell sooner"
        return more
    return "next: another --method or a smaller --ratio of loft prune, or more --epochs of retraining with a --name of their own"


def _ahead(one: Comparison | None) -> list[str]:
    return ["", ""] if one is None else [_interval(one.advantage, one.half_width, "{:+.2f}"), one.passed]


def _interval(value: float, half: float, form: str) -> str:
    return form.format(value) + (f" +- {half:.2f}" if half == half else "")
