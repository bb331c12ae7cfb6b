"""The `loft` command: its subcommands, and the one place where failures become a line and an exit code."""

import signal
import sys
import time
import traceback
from contextlib import nullcontext

import click

from loft_hpc import __version__
from loft_hpc.cli.context import Job, printable
from loft_hpc.comm.launch import announced_rank
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.training.interruption import Interruption

RANK_0_SPEAKS_SECONDS = 1.0
"""How long other ranks let rank 0 speak: a launcher ends the job at the first rank that leaves with a failure."""

LINE_ARRIVES_SECONDS = 0.5
"""How long a line may take to the launcher, which after an abort reads no more."""

INTERRUPTED = 85
"""Exit code of a training that was told to end and can go on: slurm/*.sh make a requeue of it (Slurm's RequeueExit, by custom)."""

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
    "doctor": "What is installed, what is missing, how to mend it.",
}


EXIT_SECONDS = 30
"""How long a rank that has trained may take to leave."""

TRAININGS = ("pretrain", "prune", "retrain", "check", "sweep")
"""Commands that end at their next checkpoint when they are told to."""

RESUMED = ("pretrain", "retrain")
"""Those of them that have an option to go on; the others find what is done."""


class LazyGroup(click.Group):
    """Imports a subcommand's module when it is called, so that `loft --help` and usage errors need no torch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        from importlib import import_module

        return import_module(f"loft_hpc.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loft-hpc")
def loft() -> None:
    """Find winning lottery tickets in convolutional networks by filter-wise training over MPI ranks.

    Start it with mpirun: mpirun -np 4 loft pretrain --model resnet34
    """


def main() -> None:
    """Entry point of the `loft` command."""
    # a scheduler's warning that comes before a training or just after its end must not kill what it finds
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    code = run(sys.argv[1:])
    if sys.argv[1:2] and sys.argv[1] in TRAININGS:
        # MPI's end waits for all ranks, for ever if one of them was stopped just then; no Python runs any more to notice
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 85 told to end and ready to go on."""
    interruption = Interruption()
    job = Job(interruption)
    trains = bool(arguments) and arguments[0] in TRAININGS
    try:
        with interruption if trains else nullcontext():  # from the start: a warning that comes while torch loads counts too
            code = loft.main(arguments, prog_name="loft", standalone_mode=False, obj=job)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as problem:
        if announced_rank() == 0:
            click.echo(problem.format_message(), err=True)
        return 2
    except click.ClickException as problem:
        context = getattr(problem, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return _fail(job, _line(" ".join(problem.format_message().split()) + hint), problem.exit_code, everywhere=True)
    except Interrupted as problem:
        how = "go on with --resume" if arguments[0] in RESUMED else "give the same command again to go on"
        return _fail(job, _line(f"{problem}; {how}"), INTERRUPTED, everywhere=True)
    except LoftError as problem:
        return _fail(job, _line(problem), 2 if problem.usage else 1, problem.everywhere)
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        return _fail(job, _line(f"{where}{problem.strerror or problem}: mend the path, its permissions or the space on its disk"), 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail(job, "interrupted", 1)
    except Exception as problem:
        if _is_out_of_memory(problem):
            what = (str(problem).splitlines() or ["none left"])[0][:200]
            return _fail(job, _line(f"out of memory ({what}): lower --batch-size, or use more ranks or machines"), 1)
        # a defect of ours, or a machine that fails: everything that helps to find it
        return _fail(job, "unexpected failure\n" + traceback.format_exc(), 1)


def _is_out_of_memory(problem: Exception) -> bool:
    """Python's own error, torch's on a GPU, and its plain RuntimeError on a CPU."""
    return isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError" or "allocate memory" in str(problem)


def _line(message: object) -> str:
    return " ".join(printable(str(message)).split("\n"))


def _fail(job: Job, message: str, code: int, everywhere: bool = False) -> int:
    """Tell the failure once, and make sure that no rank waits for one that is gone.

    What all ranks ran into (known to be so if `everywhere`), rank 0 tells. What befell some alone, they tell themselves, and end the
    job on all ranks.
    """
    world = job.started_world
    rank = announced_rank() if world is None else world.rank
    together = everywhere or world is None or world.size == 1 or world.failed_together()
    if rank == 0:
        print(f"loft: {message}", file=sys.stderr, flush=True)
    elif not together:
        print(f"loft: rank {rank}: {message}", file=sys.stderr, flush=True)
    elif world is None:
        time.sleep(RANK_0_SPEAKS_SECONDS)
        if not everywhere:
            print(f"loft: rank {rank}: {message}", file=sys.stderr, flush=True)
    if not together:
        time.sleep(LINE_ARRIVES_SECONDS)
        world.abort(code)
    return code


if __name__ == "__main__":
    main()
