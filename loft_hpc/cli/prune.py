"""`loft prune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loft_hpc.analysis.size import FLOPS_PER_MULTIPLY_ADD
from loft_hpc.cli.context import Job, format_option, table
from loft_hpc.cli.options import batch_parts_option, device_option, fill, reading_options, refuse_path, supervision_options
from loft_hpc.cli.presets import preset_option
from loft_hpc.cli.progress import Progress
from loft_hpc.cli.pruning import emptied_line, finder_options, prunings_of
from loft_hpc.data.registry import Reading
from loft_hpc.jobs.comparable import start_name, start_text
from loft_hpc.jobs.prune import prune
from loft_hpc.jobs.source import BLOCK_CHOICES, Surroundings
from loft_hpc.models.scores import removed_text
from loft_hpc.training.settings import Supervision
from loft_hpc.training.watching import Oversight

ratio_option = click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    default=(0.8, 0.5, 0.3),
    show_default=True,
    help="Pruning ratio: share of the hidden filters, weights or removable blocks that is removed (repeat for more tickets).",
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
@finder_options
@blocks_option
@click.option("--at", help="Network to draw from: final, init, epoch:K or step:K (a snapshot of the run).  [default: as suits the method]")
@click.option("--name", help="Name of the ticket, with a single --ratio.  [default: METHOD-CRITERION-RATIO, and the snapshot]")
@reading_options
@batch_parts_option
@supervision_options
@device_option
@format_option
@click.pass_context
def command(
    context: click.Context,
    run: str,
    ratios: tuple[float, ...],
    blocks: str,
    at: str | None,
    name: str | None,
    batch_parts: int | None,
    device: str,
    format: str,
    **options: Any,
) -> None:
    """Find tickets of RUN's network, one for each --ratio, into RUN/tickets.

    Methods that train (gem-miner, edge-popup, imp) do so over all ranks, with the run's data, batch size and optimisation, and keep their
    trainings under RUN/searches: after an interruption, give the same command again. The accuracy printed is that of the ticket as it is,
    with BatchNorm statistics re-estimated but not retrained.

    Examples: loft prune runs/RUN --ratio 0.8 --ratio 0.5 --ratio 0.3

    mpirun -np 4 loft prune runs/RUN --method gem-miner --ratio 0.95
    """
    job: Job = context.obj
    prunings = prunings_of(ratios, options)
    supervision = fill(Supervision, options)
    if len(set(ratios)) < len(ratios):
        raise click.UsageError("the same --ratio is given twice")
    refuse_path(name)
    around = Surroundings(
        job.world,
        Oversight(Progress(job.speaks and format == "table"), job.interruption, supervision),
        fill(Reading, options),
        device,
        batch_parts,
    )
    results = prune(Path(run), prunings, blocks, at, name, around)
    fields = {
        "flops_per_multiply_add": FLOPS_PER_MULTIPLY_ADD,
        "dense": {"parameters": results[0].dense.parameters, "flops": results[0].dense.flops},
        "tickets": [
            {
                "path": str(result.ticket.path),
                **result.pruning.to_json(),
                "pruning_ratio_asked": result.pruning.ratio,
                **{name: result.ticket.provenance[name] for name in ("pruning_ratio", "removed_units", "prunable_units", "emptied_layers")},
                "kind": result.ticket.mask.kind,
                "start": start_name(result.ticket.provenance),
                "filters": sum(result.ticket.hidden_widths.values()),
                "parameters": result.size.parameters,
                "flops": result.size.flops,
                "accuracy_before_retraining": result.score.accuracy,
                "cost": asdict(result.ticket.cost),
            }
            for result in results
        ],
    }
    rows = [
        [
            str(result.ticket.path),
            removed_text(result.ticket.pruning_ratio, result.pruning.ratio),
            f"{result.size.parameters:,}",
            f"{100 * result.size.parameters / result.dense.parameters:.1f} %",
            f"{100 * result.size.flops / result.dense.flops:.1f} %",
            f"{100 * result.score.accuracy:.2f} %",
            f"{result.ticket.cost.epochs:.1f}",
        ]
        for result in results
    ]
    header = ["ticket", "pruned", "parameters", "of dense", "FLOPs of dense", "accuracy, not retrained", "epochs to find it, all workers"]
    emptied = [emptied_line(str(result.ticket.path), layers) for result in results if (layers := result.ticket.mask.emptied())]
    first = results[0].ticket
    lines = [
        table(header, rows),
        *emptied,
        f"tickets start from {start_text(start_name(first.provenance))}",
        f"next: mpirun -np {max(job.world.size, 4)} loft retrain {first.path}",
    ]
    job.show(format, fields, "\n".join(lines))
