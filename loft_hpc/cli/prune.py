"""`loft prune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loft_hpc.analysis.size import FLOPS_PER_MULTIPLY_ADD
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import device_option, fill, moved_data_option, option, several
from loft_hpc.cli.presets import preset_option
from loft_hpc.jobs.prune import BLOCK_CHOICES, FINAL, prune
from loft_hpc.models.scores import NORMS
from loft_hpc.tickets.finders import FINDERS, SCOPES, Pruning

pruning_options = several(
    option(Pruning, "method", "How the filters that stay are chosen.", type=click.Choice(list(FINDERS))),
    option(Pruning, "criterion", "Norm of a filter's weights; the largest stay.", type=click.Choice(list(NORMS))),
    option(Pruning, "scope", "The same ratio in every block, or one ranking over all blocks.", type=click.Choice(SCOPES)),
    option(Pruning, "floor", "Share of its filters that --scope global leaves every block at least.", type=float),
    option(Pruning, "seed", "Seed of --method random.", type=int),
)


ratio_option = click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    default=(0.8, 0.5, 0.3),
    show_default=True,
    help="Pruning ratio: share of the hidden filters removed (repeat for more tickets).",
)


blocks_option = click.option(
    "--blocks",
    type=click.Choice(BLOCK_CHOICES),
    default="all",
    show_default=True,
    help="Blocks to prune: all, or as in LoFT's release all but the first of each stage.",
)


@click.command("prune")
@click.argument("run", type=click.Path())
@preset_option("prune")
@ratio_option
@pruning_options
@blocks_option
@click.option(
    "--at", default=FINAL, show_default=True, help="Network to draw from: final, init, epoch:K or step:K (a snapshot of the run)."
)
@click.option("--name", help="Name of the ticket, with a single --ratio.  [default: METHOD-CRITERION-RATIO, and the snapshot]")
@moved_data_option
@device_option
@format_option
@click.pass_context
def command(
    context: click.Context,
    run: str,
    ratios: tuple[float, ...],
    blocks: str,
    at: str,
    name: str | None,
    data_dir: str | None,
    device: str,
    format: str,
    **options: Any,
) -> None:
    """Draw tickets from the final network of RUN, or from a snapshot, one for each --ratio, into RUN/tickets.

    Ranks every block's hidden filters and keeps the best. The accuracy printed is that of the ticket as it is, with BatchNorm
    statistics re-estimated but not retrained.

    Example: loft prune runs/RUN --ratio 0.8 --ratio 0.5 --ratio 0.3
    """
    job: Job = context.obj
    prunings = [fill(Pruning, options, ratio=ratio) for ratio in ratios]
    if len(set(ratios)) < len(ratios):
        raise click.UsageError("the same --ratio is given twice")
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise click.UsageError(f"--name '{name}' is no plain folder name")
    results = prune(Path(run), prunings, blocks, at, name, data_dir, device, job.world)
    fields = {
        "flops_per_multiply_add": FLOPS_PER_MULTIPLY_ADD,
        "dense": {"parameters": results[0].dense.parameters, "flops": results[0].dense.flops},
        "tickets": [
            {
                "path": str(result.ticket.path),
                **asdict(result.pruning),
                "filters": sum(result.ticket.hidden_widths.values()),
                "parameters": result.size.parameters,
                "flops": result.size.flops,
                "accuracy_before_retraining": result.score.accuracy,
            }
            for result in results
        ],
    }
    rows = [
        [
            str(result.ticket.path),
            f"{100 * result.pruning.ratio:g} %",
            f"{result.size.parameters:,}",
            f"{100 * result.size.parameters / result.dense.parameters:.1f} %",
            f"{100 * result.size.flops / result.dense.flops:.1f} %",
            f"{100 * result.score.accuracy:.2f} %",
        ]
        for result in results
    ]
    job.show(format, fields, table(["ticket", "pruned", "parameters", "of dense", "FLOPs of dense", "accuracy, not retrained"], rows))
