"""`loft doctor`."""

from dataclasses import asdict
from pathlib import Path

import click

from loft_hpc.cli.context import Job, format_option
from loft_hpc.jobs.doctor import examine


@click.command("doctor")
@click.option("--data-dir", type=click.Path(), default="data", show_default=True, help="Folder to look for data sets in.")
@format_option
@click.pass_context
def command(context: click.Context, data_dir: str, format: str) -> None:
    """Say what is installed and what is missing, each with what mends it. Exit code 1 if training cannot run."""
    job: Job = context.obj
    findings = examine(Path(data_dir))
    width = max(len(finding.name) for finding in findings)
    lines = [
        f"{finding.state:<8}{finding.name:<{width}}  {finding.found}{f'  ->  {finding.mend}' if finding.mend else ''}"
        for finding in findings
    ]
    job.show(format, {"findings": [asdict(finding) for finding in findings]}, "\n".join(lines))
    if any(finding.state == "missing" for finding in findings):
        context.exit(1)
