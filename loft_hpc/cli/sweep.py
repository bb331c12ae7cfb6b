"""`loft sweep`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import (
    NEVER,
    arithmetic_options,
    device_option,
    fill,
    judging_options,
    optimisation_options,
    option,
    plot_option,
    reading_options,
    refuse_path,
)
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress
from loft_hpc.cli.prune import blocks_option, ratio_option
from loft_hpc.cli.pruning import emptied_line, finder_options, prunings_of
from loft_hpc.data.registry import DataSettings, Reading
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.jobs.retrain import LEARNING_RATE, RetrainSettings
from loft_hpc.jobs.stops import earliest_stops, stop_fields, stop_sentence
from loft_hpc.jobs.sweep import EVERY, SweepSettings, sweep
from loft_hpc.runs.run import Run
from loft_hpc.screen import tell
from loft_hpc.training.settings import Checkpointing, Computation, Evaluation, Optimisation, Snapshots, Supervision
from loft_hpc.training.watching import Oversight


class SweepProgress:
    """A line for every point."""

    def __init__(self, speaks: bool):
        self._speaks = speaks

    def trained(self, number: int, trainings: int, what: str, accuracy: float, seconds_left: float | None) -> None:
        if self._speaks:
            left = f"   about {_duration(seconds_left)} left" if seconds_left and number < trainings else ""
            tell(f"{number:>{len(str(trainings))}}/{trainings}   {what}: {100 * accuracy:.2f} %{left}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@click.command("sweep")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@preset_option("prune", "retrain")
@ratio_option
@finder_options
@blocks_option
@click.option(
    "--at",
    multiple=True,
    default=(EVERY,),
    show_default=True,
    help="Snapshots to draw tickets from: every, or init, epoch:K, step:K (repeat for more).",
)
@option(RetrainSettings, "rewind", "Weights to retrain from: none (those of the snapshot), init, epoch:K or step:K.", type=str)
@click.option("--dense", is_flag=True, help="Retrain the dense network of every snapshot as well, to set the tickets against.")
@reading_options
@option(RetrainSettings, "epochs", "Passes over the training images, of each retraining.", type=int)
@option(RetrainSettings, "batch_size", "Images per step of all ranks together.", type=int)
@optimisation_options(lr=LEARNING_RATE)
@click.option("--retrain-seed", default=0, show_default=True, type=int, help="Decides data order and augmentation of the retrainings.")
@judging_options
@device_option
@arithmetic_options
@click.option("--name", default="default", show_default=True, help="Folder under RUN/sweeps: one for each recipe of retraining.")
@plot_option("accuracy after retraining over the epoch of the snapshot.")
@format_option
@click.pass_context
def command(
    context: click.Context, runs: tuple[str, ...], ratios: tuple[float, ...], at: tuple[str, ...],
    blocks: str, dense: bool, retrain_seed: int, name: str, plot: Path | None, format: str, **options: Any,
) -> None:  # fmt: skip
    """Could pretraining have stopped earlier? Draws a ticket from every snapshot of each RUN and retrains them all.

    What is done is not done again: give the same command after an interruption, or with more ratios, snapshots or runs. Runs of
    one strategy and number of workers (other seeds) are averaged in the plot.

    Example: mpirun -np 4 loft sweep runs/RUN --ratio 0.8 --at every --plot sweep.png
    """
    job: Job = context.obj
    prunings = prunings_of(ratios, options)
    if len(set(ratios)) < len(ratios) or len(set(at)) < len(at) or len({Path(run).resolve() for run in runs}) < len(runs):
        raise click.UsageError("a run, --ratio or --at is given twice")
    if EVERY in at and len(at) > 1:
        raise click.UsageError("--at every stands for all snapshots: give it alone")
    refuse_path(name)
    parts = {
        "optimisation": fill(Optimisation, options),
        "evaluation": fill(Evaluation, options | {"evaluate_every": NEVER}),
        "computation": fill(Computation, options),
        "snapshots": Snapshots(snapshot_every="0"),
        "checkpoints": Checkpointing(),
    }

    def recipe(run: Run) -> RetrainSettings:
        return fill(RetrainSettings, options | {"seed": retrain_seed}, data=settings_of(run).data.read(fill(Reading, options)), **parts)

    fill(RetrainSettings, options | {"seed": retrain_seed}, data=DataSettings(), **parts)  # mistakes in the options, before a file is read
    job.join()
    world = job.world
    progress = SweepProgress(job.speaks and format == "table")
    quiet = Oversight(Progress(False), job.interruption, Supervision())
    points = sweep([Path(run) for run in runs], SweepSettings(prunings, blocks, at, name, dense), recipe, world, progress, quiet)
    if plot:
        from loft_hpc.analysis.plots import plot_sweep

        job.once(lambda: plot_sweep(points, plot))
    stops = [(stop, stop.saved()) for stop in earliest_stops(points)]
    fields = [{**asdict(point), "run": str(point.run), "retrained": str(point.retrained)} for point in points]
    rows = [
        [str(point.run), point.label, point.snapshot, f"{point.epoch:.4g}", point.removed, f"{100 * point.accuracy:.2f} %",
         "" if point.dense_accuracy is None else f"{100 * (point.accuracy - point.dense_accuracy):+.2f}"]
        for point in points
    ]  # fmt: skip
    header = ["run", "strategy", "snapshot", "epochs done", "pruned", "retrained", "against dense"]
    notes = [emptied_line(str(point.retrained), point.emptied_layers) for point in points if point.emptied_layers]
    notes.append("against dense: points over the dense network that was retrained from the same snapshot by the same recipe")
    if any(point.dense_accuracy is None for point in points):
        notes.append("it is empty where that was not trained: give the same command with --dense")
    lines = [table(header, rows), *notes, *(stop_sentence(*stop) for stop in stops)]
    job.show(format, {"points": fields, "stops": [stop_fields(*stop) for stop in stops]}, "\n".join(lines))
