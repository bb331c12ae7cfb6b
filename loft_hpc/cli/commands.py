"""The names of the subcommands, and what must happen before the first of their modules is imported."""

import signal
from collections.abc import Sequence

from loft_hpc.training.interruption import Interruption

COMMANDS = {
    "pretrain": "Find a ticket: train a network over all ranks.",
    "prune": "Find tickets of a pretraining run's network.",
    "retrain": "Train a ticket over all ranks.",
    "check": "Is it a winning ticket? Controls, retrained over seeds.",
    "compare": "Tickets side by side: accuracy, size, cost, energy, robustness.",
    "sweep": "Retrain a ticket of every snapshot: when is it there?",
    "theory": "LoFT's Theorem 1, checked numerically.",
    "measure": "Accuracy, size, latency and filter distance.",
    "export": "A network as a file that others run: torch.export, ONNX, safetensors.",
    "commcost": "The communication-cost report.",
    "plan": "What a job script would take: hours, GPU-hours and bytes.",
    "doctor": "What is installed, what is missing, how to fix it.",
}

TRAININGS = ("pretrain", "prune", "retrain", "check", "sweep")
"""Commands that end at their next checkpoint when they are told to."""

RESUMED = ("pretrain", "retrain")
"""Those of them that have an option to go on; the others find what is done."""


def trains(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in TRAININGS


def listen(arguments: Sequence[str]) -> Interruption:
    """Note signals from the command's first moment on, so that a warning that comes while torch loads counts; others ignore the warnings."""
    interruption = Interruption()
    if trains(arguments):
        interruption.listen()
    else:
        for warning in (signal.SIGUSR1, signal.SIGUSR2):  # a job script passes them on to whatever it is at
            signal.signal(warning, signal.SIG_IGN)
    return interruption
