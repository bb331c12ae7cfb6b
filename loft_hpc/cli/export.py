"""`loft export`."""

from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job
from loft_hpc.cli.options import device_option, reading_options
from loft_hpc.data.registry import Reading
from loft_hpc.jobs.export import TOLERANCE, ExportSettings, export
from loft_hpc.models.formats import FORMATS

UNTRAINED = "; the ticket as it was pruned: loft retrain trains it, and loft export takes that run"


@click.command("export")
@click.argument("path", metavar="RUN_OR_TICKET", type=click.Path())
@click.option("--format", type=click.Choice(list(FORMATS)), help="Format of the file, as --output must end.  [default: as it ends]")
@click.option("--output", required=True, type=click.Path(), help="File to write; with safetensors, a .json of the same name too.")
@click.option(
    "--fold-normalisation",
    is_flag=True,
    help="Put the input's normalisation into the network, which then takes pixels from 0 to 1 (pt2 and onnx).",
)
@reading_options
@device_option
@click.pass_context
def command(
    context: click.Context, path: str, format: str | None, output: str, fold_normalisation: bool, device: str, **reading: Any
) -> None:
    """Write the network of a finished run or of a ticket as a file that others run.

    pt2 (torch.export) loads with torch alone, onnx with onnxruntime; both take any number of images, (N, C, H, W)
    float32. safetensors is the state dict with a JSON file beside it. Each holds how to feed it: mean, standard
    deviation, image size, class names.

    BatchNorm statistics are re-estimated first, over all ranks. The file is read back and run beside the network on
    test images: the largest difference is printed, and nothing is kept if it is more than 1e-4 of an image's largest
    score.

    Examples: loft export runs/RUN/tickets/magnitude-l2-0.8 --output ticket.onnx

    loft export runs/RETRAINED --fold-normalisation --output network.pt2
    """
    job: Job = context.obj
    chosen = format or Path(output).suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise click.UsageError(f"--output {output} has none of the endings .{', .'.join(FORMATS)}: give it one")
    settings = ExportSettings(Path(output), chosen, fold_normalisation)
    job.join()
    done = export(Path(path), settings, Reading(**reading), device, job.world)
    score, difference = done.score, done.difference
    job.say(
        f"wrote {' and '.join(map(str, done.files))} ({chosen}, {done.parameters:,} parameters)\n"
        f"test accuracy: {100 * score.accuracy:.2f} % ({score.correct} of {score.images}){UNTRAINED if (Path(path) / 'ticket.json').is_file() else ''}\n"
        f"read back and run on {difference.images} test images: largest difference {difference.absolute:.2g}, relative to the image's "
        f"largest score {difference.relative:.2g} (at most {TOLERANCE:g})" + (f"\nnote: {done.note}" if done.note else "")
    )
