"""`loft commcost`: the poster's column from the formula, and the ledgers of real runs beside it."""

import math
from dataclasses import dataclass
from pathlib import Path

from loft_hpc.analysis.commcost import Division, division, exchanged_bytes, loft_bytes
from loft_hpc.errors import LoftError
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.runs.run import Run


@dataclass(frozen=True)
class RunCost:
    """What the formula says of a LoFT run, and what its ledger says."""

    path: Path
    workers: int
    rounds: int
    divided: Division
    formula_bytes: int
    ledger_bytes: int


def run_cost(path: Path) -> RunCost:
    """Formula and ledger of a finished LoFT run. Raises LoftError for another kind of run."""
    run = Run.open(path)
    settings = settings_of(run)
    if settings.strategy != "loft":
        raise LoftError(f"{path} was trained with --strategy {settings.strategy}: the formula is LoFT's")
    ledgers = run.read_ledgers()
    total_steps = run.description.get("total_steps")
    if not isinstance(total_steps, int):
        raise LoftError(f"{path / 'run.json'} does not say how many steps were made: restore it")
    rounds = math.ceil(total_steps / settings.loft.local_iterations)
    divided = division(run.architecture, settings.loft.partition)
    formula = loft_bytes(divided, len(ledgers), rounds, settings.loft.momentum_across_rounds == "carry")
    return RunCost(path, len(ledgers), rounds, divided, formula, exchanged_bytes(ledgers))
