"""`loft doctor`."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from loft_hpc.cli.context import Job, format_option
from loft_hpc.cli.leave_out import leave_out_option
from loft_hpc.data.catalogue import CHECKED_AT_ONCE, DATASET_NAMES, IMAGE_FOLDERS, MAX_LOADER_WORKERS
from loft_hpc.jobs.doctor import Finding, broken_images, examine, look, write_list
from loft_hpc.screen import printable, write

TENTHS = 10
"""Lines of progress where nobody watches."""


@click.command("doctor")
@click.option("--data-dir", type=click.Path(), default="data", show_default=True, help="Folder to look for data sets in.")
@click.option(
    "--dataset", type=click.Choice(DATASET_NAMES), help="Look at this data set alone, as a training would, and say what is wrong with it."
)
@leave_out_option
@click.option("--every-image", is_flag=True, help="Decode all images of imagenet or imagefolder, and name those that cannot be read.")
@click.option(
    "--broken",
    "broken_path",
    metavar="FILE",
    type=click.Path(),
    help="New file for their names, with those of --leave-out: a list that --leave-out takes.",
)
@click.option(
    "--loader-workers",
    type=click.IntRange(0, MAX_LOADER_WORKERS),
    help="Processes that decode for --every-image.  [default: one for each core]",
)
@format_option
@click.pass_context
def command(
    context: click.Context, data_dir: str, dataset: str | None, leave_out: tuple[str, ...], every_image: bool, broken_path: str | None,
    loader_workers: int | None, format: str,
) -> None:  # fmt: skip
    """Say what is installed and what is missing, each with what fixes it, and which data can be read.

    Exit code 1 if training cannot run, or if data are broken.

    Example: loft doctor --data-dir DIR --dataset imagefolder --every-image --broken broken.txt, and then
    loft pretrain --data-dir DIR --dataset imagefolder --leave-out broken.txt
    """
    job: Job = context.obj
    _refuse_contradictions(context)
    broken: list[tuple[str, str]] = []
    if dataset is None:
        findings = examine(Path(data_dir))
    else:
        finding, data = look(dataset, Path(data_dir), leave_out)
        findings = [finding]
        if finding.state == "ok" and dataset in IMAGE_FOLDERS and not every_image:
            findings = [replace(finding, found=f"{finding.found}; not decoded yet (--every-image)")]
        if every_image and data is not None and job.speaks:
            broken = broken_images(data, loader_workers, _tell_progress)
            if broken_path is not None:
                write_list(Path(broken_path), [*leave_out, *(name for name, _ in broken)])
            findings.append(_of_images(len(broken), data.info.train_images + data.info.test_images, broken_path))
    width = max(len(finding.name) for finding in findings)
    lines = [
        f"{finding.state:<8}{finding.name:<{width}}  {finding.found}{f'  ->  {finding.mend}' if finding.mend else ''}"
        for finding in findings
    ]
    fields: dict[str, Any] = {"findings": [asdict(finding) for finding in findings]}
    if every_image:
        from loft_hpc.data.leave_out import to_line  # needs torch, which may be what is missing

        lines += [f"{printable(name)}: {why}" for name, why in broken]
        fields["broken_images"] = [{"image": to_line(name), "problem": why} for name, why in broken]
    job.show(format, fields, "\n".join(lines))
    if any(finding.state in ("missing", "broken") for finding in findings):
        context.exit(1)


def _refuse_contradictions(context: click.Context) -> None:
    given = context.params
    if given["dataset"] not in IMAGE_FOLDERS:
        for name in ("leave_out", "every_image"):
            if given[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} belongs to --dataset {' or '.join(IMAGE_FOLDERS)}")
    if given["broken_path"] is not None:
        if not given["every_image"]:
            raise click.UsageError("--broken belongs to --every-image")
        if Path(given["broken_path"]).exists():
            raise click.UsageError(f"--broken {given['broken_path']} exists, and nothing is overwritten: name a new file")


def _of_images(broken: int, images: int, path: str | None) -> Finding:
    if not broken:
        return Finding("every image", "ok", f"{images:,} can be read")
    how = f"train with --leave-out {path}" if path else "have them listed by --broken FILE, which --leave-out FILE takes"
    return Finding("every image", "broken", f"{broken:,} of {images:,} cannot be read", f"restore them, or {how}")


def _tell_progress(done: int, images: int, broken: int) -> None:
    """On standard error: in place where somebody watches, else a line for each tenth."""
    if sys.stderr is None:
        return
    watched = sys.stderr.isatty()
    if watched or TENTHS * done // images > TENTHS * (done - CHECKED_AT_ONCE) // images:
        ends = "\r" if watched and done < images else "\n"
        write(f"{done:,} of {images:,} images, {broken:,} broken{ends}", error=True)
