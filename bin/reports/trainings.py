"""Real runs of the loft command for reports. What is done is kept and used again, so that an interrupted report goes on."""

import json
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loft_hpc.analysis.statistics import mean_interval


def loft(*command: object, ranks: int = 0, threads: int | None = None) -> str:
    """A loft command, under mpirun if `ranks` are given; what it printed. A failure ends the report, saying why."""
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    words = [*launcher, "loft", *map(str, command)]
    finished = subprocess.run(words, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}")
    return finished.stdout


def train(run: Path, *command: object, ranks: int = 0, threads: int | None = None) -> dict[str, Any]:
    """A pretraining or retraining that leaves `run`, unless that is done already; its results."""
    if not (run / "run.json").exists() or json.loads((run / "run.json").read_text())["status"] != "done":
        loft(*command, "--run", run, "--resume", ranks=ranks, threads=threads)
    return json.loads((run / "run.json").read_text())["results"]


def sweep(run: Path, *options: object) -> list[dict[str, Any]]:
    """`loft sweep` of one run on one thread; its points."""
    return json.loads(loft("sweep", run, *options, "--format", "json", threads=1))["points"]


def side_by_side(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls of one thread each, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def with_interval(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Mean and 95 % interval (Student), as tables show them."""
    mean, half = mean_interval(values)
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    if math.isnan(half):
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(mean - half)} to {form.format(mean + half)})"
