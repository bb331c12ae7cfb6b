"""--leave-out, which takes a list of images as `loft doctor --every-image` writes it."""

from pathlib import Path

import click


def _read(context: click.Context, parameter: click.Parameter, file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    from loft_hpc.data.leave_out import read_list  # needs torch, which loft doctor may have to find missing

    return read_list(Path(file))


leave_out_option = click.option(
    "--leave-out", metavar="FILE", type=click.Path(), callback=_read,
    help="List of images of imagenet or imagefolder that are no part of the data, one train/CLASS/IMAGE a line (loft doctor --every-image).",
)  # fmt: skip
