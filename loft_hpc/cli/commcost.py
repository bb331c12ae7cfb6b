"""`loft commcost`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loft_hpc.analysis.poster import poster_table
from loft_hpc.analysis.timing import Cluster
from loft_hpc.cli.commcost_reports import case_report, poster_report, title
from loft_hpc.cli.commcost_runs import run_records, run_report
from loft_hpc.cli.context import Job, Report
from loft_hpc.cli.options import cluster_option, fill, option, plot_option, several, typed
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.pretrain import EPOCHS_HELP, loft_options, pipeline_options
from loft_hpc.data.registry import DATASET_NAMES, DataSettings, known_shape
from loft_hpc.filterwise.emergence import Stopping
from loft_hpc.filterwise.loft import LoftSettings
from loft_hpc.jobs.commcost import run_cost
from loft_hpc.jobs.prediction import predict
from loft_hpc.jobs.pretrain import STRATEGIES, PretrainSettings
from loft_hpc.models.architecture import MODEL_NAMES
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.training.settings import Computation, Evaluation, Optimisation, Snapshots

WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _workers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in value.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 2:
        raise click.BadParameter(f"{value} is no list of numbers of workers, from 2 on: as in 2,4,8")
    return numbers


case_options = several(
    option(PretrainSettings, "model", "Residual network.", type=click.Choice(MODEL_NAMES), metavar="MODEL"),
    option(PretrainSettings, "widen", "Hidden filters as a multiple of the stage's width.  [default: 2 for wideresnet, else 1]", type=float),
    click.option("--dataset", type=click.Choice(DATASET_NAMES), default="cifar10", show_default=True, help="Data set (not read: its shape counts)."),
    click.option("--image-size", type=click.IntRange(8), help="Pixels per side.  [default: the data set's own]"),
    option(PretrainSettings, "epochs", EPOCHS_HELP, type=int),
    option(PretrainSettings, "rounds", "Rounds of LoFT, in place of those that the epochs make.", type=int),
    option(PretrainSettings, "batch_size", "Images per step: of each worker under loft, of all together under data-parallel and gpipe.", type=int),
    click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES), default=STRATEGIES, help="Repeat for more.  [default: all]"),
    click.option("--workers", callback=_workers, default=",".join(map(str, WORKERS)), show_default=True, help="Numbers of workers."),
    loft_options,
    pipeline_options,
)  # fmt: skip


@click.command("commcost")
@click.argument("runs", metavar="[RUN...]", nargs=-1, type=click.Path())
@click.option("--verify", is_flag=True, help="With runs: print every row of their ledgers beside the closed formula.")
@preset_option("pretrain", partly=True)
@case_options
@cluster_option("predicts times too.")
@plot_option("bytes (and times) over workers.")
@click.option(
    "--format", type=click.Choice(["table", "json", "csv", "latex"]), default="table", show_default=True, help="How results are printed."
)
@click.pass_context
def command(
    context: click.Context, runs: tuple[str, ...], verify: bool, strategies: tuple[str, ...], workers: tuple[int, ...],
    cluster_name: str | None, plot: Path | None, format: str, **options: Any,
) -> None:  # fmt: skip
    """How many bytes training sends: of real runs, of any case, or in the poster's table.

    With the folders of runs (loft pretrain, loft retrain): how many times fewer bytes each sent than the GPipe run
    among them, or than the one that sent most, and their totals, counted in three ways. For a LoFT run alone, also what
    GPipe and data-parallel training would have sent. Ledgers must equal the closed formulas to the byte; where one does
    not, the command fails.

    With options of a case: the bytes that each strategy would send over the whole training, by the formulas, and with
    --cluster the seconds of an epoch by an alpha-beta model. With nothing: the poster's column, GPipe and LoFT, printed
    and by formula.

    \b
    Examples: loft commcost runs/LOFT runs/GPIPE
              loft commcost --preset imagenet-preresnet18 --workers 4,16
              loft commcost --model preresnet34 --widen 2 --workers 2,4 --exchange alltoall --partition all-blocks
              loft commcost --cluster ethernet-1g --plot cost.png
    """
    job: Job = context.obj
    job.join()
    of_case = typed(context) - {"format", "runs", "verify"} or context.default_map  # which a preset fills
    if runs:
        if of_case:
            raise click.UsageError("options of a case say nothing about a run: give runs or options")
        _runs(job, [Path(run) for run in runs], verify, format)
    elif verify:
        raise click.UsageError("--verify sets runs beside the formula: give their folders")
    elif of_case:
        _case(job, strategies, workers, cluster_name, plot, format, options)
    else:
        report = poster_report(poster_table())
        _show(job, format, "poster", report)


def _runs(job: Job, paths: Sequence[Path], verify: bool, format: str) -> None:
    if len({path.resolve() for path in paths}) < len(paths):
        raise click.UsageError("a run is given twice")
    costs = [run_cost(path) for path in paths]
    text = run_report(costs, verify, format)
    if verify:  # the proof is shown where it fails too
        job.show(format, run_records(costs), text)
    for cost in costs:
        cost.refuse_difference()
    if not verify:
        job.show(format, run_records(costs), text)


def _show(job: Job, format: str, name: str, report: Report) -> None:
    job.show(format, {name: list(report.records)}, report.printed(format))


def _case(
    job: Job, strategies: Sequence[str], workers: Sequence[int], cluster_name: str | None, plot: Path | None, format: str, options: dict
) -> None:
    settings = fill(
        PretrainSettings,
        options,
        strategy="loft",
        seed=0,
        data=DataSettings(dataset=options["dataset"], image_size=options["image_size"]),
        loft=fill(LoftSettings, options),
        pipeline=fill(PipelineSettings, options),
        optimisation=Optimisation(),
        evaluation=Evaluation(),
        computation=Computation(),
        snapshots=Snapshots(snapshot_every="0"),
        stopping=Stopping(),
    )
    known_shape(settings.data.dataset, settings.data.image_size)
    cluster = Cluster.read(cluster_name) if cluster_name else None
    cases = {
        name: replace(settings, strategy=name, rounds=settings.rounds if name == "loft" else None) for name in dict.fromkeys(strategies)
    }
    predictions = [predict(case, number, cluster) for number in workers for case in cases.values()]
    if plot:
        from loft_hpc.analysis.plots import plot_costs

        job.once(lambda: plot_costs(predictions, plot, title(settings), cluster.name if cluster else None))
    report = case_report(predictions, settings, cluster)
    _show(job, format, "cases", report)
