"""`loft compare`."""

from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, Report, table
from loft_hpc.cli.measuring import NO_TRAINING_MEMORY, measure_options, measure_settings
from loft_hpc.cli.options import device_option, fill, plot_option, reading_options
from loft_hpc.cli.units import bytes_text
from loft_hpc.data.registry import Reading
from loft_hpc.jobs.compare import Contender, compare, to_fields
from loft_hpc.jobs.leaders import leaders, next_step

ROBUSTNESS = ("FGSM, %", "PGD, %", "corrupted, %")


@click.command("compare")
@click.argument("runs", metavar="RUN_OR_TICKET...", nargs=-1, required=True, type=click.Path())
@measure_options(energy=True, robustness=False)
@reading_options
@plot_option("accuracy after retraining over density, with 95 % intervals.")
@device_option
@click.option(
    "--format", type=click.Choice(["table", "json", "csv", "latex"]), default="table", show_default=True, help="How results are printed."
)
@click.pass_context
def command(context: click.Context, runs: tuple[str, ...], plot: Path | None, device: str, format: str, **options: Any) -> None:
    """Retrained tickets side by side, whatever found them: accuracy, size, cost of finding, latency, memory, energy.

    Give runs of loft retrain (a ticket stands for its own), and of loft pretrain. What had another start or another training stands in a
    table of its own: it cannot be ranked against the others. "Against dense" is the difference to the dense network that was retrained from
    the same start, by the same recipe and seed (loft retrain RUN --dense, or loft check); it is empty where that was not done. Runs that
    differ in their seed alone make one row; latency, memory, energy and robustness are then those of the first. Density is the share of the
    dense network's parameters that stays (the Gem-Miner paper calls it sparsity; a pruning ratio is the share removed).

    Example: loft compare runs/* --plot accuracy.png
    """
    job: Job = context.obj
    settings = measure_settings(options)
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise click.UsageError("a run is given twice")
    job.join()
    compared = compare([Path(run) for run in runs], settings, fill(Reading, options), device, job.world)
    contenders = sorted(compared.contenders, key=lambda one: (bool(one.start), one.budget, one.kind != "dense", -one.density, one.label))
    if plot:
        from loft_hpc.analysis.plots import plot_tickets

        job.once(lambda: plot_tickets(contenders, plot))
    records = [to_fields(one, settings.carbon_intensity) for one in contenders]
    header = [
        "method", "kind", "density", "FLOPs", "accuracy, %", "runs", "against dense, points", "images seen", "epochs to find", "handed over to find",
        "speed-up", "training memory", "energy saved",
        *(ROBUSTNESS if settings.robustness else ()),
    ]  # fmt: skip
    notes = [
        "density: parameters that stay; FLOPs: share of the dense network's, a multiply-add counting 2, weights that are masked left out",
        "images seen: by the weights, in pretraining and retraining, of all workers together; epochs to find: of all workers together",
        "handed over to find: bytes that the ranks handed over for sending (loft commcost has the other counts)",
        f"intervals: 95 %, Student; speed-up: latency of {settings.latency_batch} images, dense over ticket, with the quartiles furthest apart",
    ]
    if settings.latency_batch < 2:
        notes.append(NO_TRAINING_MEMORY)
    if settings.energy:
        spent = contenders[0].measured.energy[0].energy
        notes.append(f"energy of inference from {spent.source}" + ("" if spent.measured else ": an estimate, not a measurement"))
    if settings.robustness:
        notes.append(
            f"FGSM and PGD: epsilon {settings.epsilon:.4g} of the pixel range; corrupted: mean over corruptions and severities "
            + ", ".join(map(str, settings.severities))
        )
    notes += [f"note: {one.measured.note}" for one in contenders if one.measured.note]
    notes += [f"note: {note}" for note in compared.notes]
    missing = dict.fromkeys(one.dense_command for one in contenders if one.dense_command)
    notes += [f"against dense is empty where that network was not retrained likewise: {command}" for command in missing]
    rows = [_row(one)[: len(header)] for one in contenders]
    if format == "table":
        budgets = list(dict.fromkeys(one.budget for one in contenders))
        tables = [
            f"{budget}\n{table(header, [row for row, one in zip(rows, contenders, strict=True) if one.budget == budget])}"
            for budget in budgets
        ]
        lines = [*leaders(contenders), "", "\n\n".join(tables), "", *notes]
        job.say("\n".join([*lines, next_step(contenders)]).strip("\n"))
        return
    job.show(
        format,
        {"tickets": records, "leaders": leaders(contenders), "notes": list(compared.notes)},
        Report(header, rows, records, notes).printed(format),
    )


def _row(one: Contender) -> list[str]:
    fields = to_fields(one)

    def per_cent(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{100 * value:.{digits}f}"

    def interval(value: float | None, half: float | None, form: str) -> str:
        return "" if value is None else form.format(value) + ("" if half is None else f" +- {half:.2f}")

    return [
        one.label,
        one.kind,
        f"{per_cent(one.density, 2)} %",
        f"{per_cent(fields['flops_share'])} %",
        interval(100 * one.mean, None if fields["accuracy_half_width"] is None else 100 * one.half_width, "{:.2f}"),
        str(len(one.paths)),
        "" if one.kind == "dense" else interval(fields["against_dense_points"], fields["against_dense_half_width_points"], "{:+.2f}"),
        "" if one.images is None else f"{one.images:,}",
        f"{one.cost.epochs:.1f}",
        bytes_text(one.cost.payload_bytes),
        f"{fields['speedup']:.2f}x ({fields['speedup_low']:.2f} to {fields['speedup_high']:.2f})",
        "" if fields["training_memory_share"] is None else f"{per_cent(fields['training_memory_share'])} %",
        "" if fields["energy_saved_share"] is None else f"{per_cent(fields['energy_saved_share'])} %",
        per_cent(fields.get("accuracy_fgsm")),
        per_cent(fields.get("accuracy_pgd")),
        per_cent(fields["accuracy_corrupted"]),
    ]
