"""The `loft` command: its subcommands, and the one place where failures become a line and an exit code."""

import errno
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from loft_hpc import __version__
from loft_hpc.cli.commands import COMMANDS, RESUMED, listen, trains
from loft_hpc.cli.context import Job
from loft_hpc.comm.launch import announced_rank
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.packages import what_is_missing
from loft_hpc.screen import outlive_readers, printable, tell
from loft_hpc.training.interruption import WARNINGS, Interruption

RANK_0_SPEAKS_SECONDS = 1.0
"""How long other ranks let rank 0 speak: a launcher ends the job at the first rank that leaves with a failure."""

LINE_ARRIVES_SECONDS = 0.5
"""How long a line may take to the launcher, which after an abort reads no more."""

INTERRUPTED = 85
"""Exit code of a training that was preempted and can go on: slurm/*.sh make a requeue of it (Slurm's RequeueExit, by custom)."""

SIGPIPE = 128 + signal.SIGPIPE
"""Exit code of a command whose reader went before its end, as the shell says it of every other program."""

EXIT_SECONDS = 30
"""How long a rank that has trained may take to leave."""


class LazyGroup(click.Group):
    """Imports a subcommand's module when it is called, so that `loft --help` and usage errors need no torch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        try:
            return import_module(f"loft_hpc.cli.{name}").command
        except ImportError:
            if context.resilient_parsing:  # a shell that completes what is being typed, where no message belongs
                return None
            raise

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=what) for name, what in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, context, incomplete)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loft-hpc")
def loft() -> None:
    """Find winning lottery tickets in convolutional networks by filter-wise training over MPI ranks.

    Start it with mpirun: mpirun -np 4 loft pretrain --model resnet34
    """


def main(interruption: Interruption | None = None) -> None:
    """The `loft` command. `interruption`: what has noted signals since the process began, if anything has."""
    output = outlive_readers()
    arguments = sys.argv[1:]
    code = run(arguments, interruption or listen(arguments))
    if trains(arguments):
        for warning in WARNINGS:  # there is nothing left to lose, and no handler runs any more in MPI's end
            signal.signal(warning, signal.SIG_IGN)
        # MPI's end waits for all ranks, for ever if one of them was stopped just then; no Python runs any more to notice
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)
    sys.stdout.flush()
    sys.exit(_code_without_reader(code, output.problem, trains(arguments)) if output.problem else code)


def _code_without_reader(code: int, problem: OSError, trained: bool) -> int:
    """The exit code of a command whose output was not taken to the end. What a training does lies in its run; of others it is the output."""
    if problem.errno == errno.EPIPE:  # the reader has had enough
        return code if trained or code else SIGPIPE
    what = f"standard output cannot be written to ({problem.strerror})"
    tell(f"loft: note: {what}: see the run's folder" if trained else f"loft: {what}: free space or name another file", error=True)
    return code if trained else code or 1


def run(arguments: list[str], interruption: Interruption | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 85 preempted and ready to go on.

    `interruption` notes signals already; without one, a training notes them for its own length.
    """
    own = Interruption()
    job = Job(interruption or own)
    program = "python -m loft_hpc" if sys.argv[0].endswith("__main__.py") else "loft"
    try:
        with own if trains(arguments) and interruption is None else nullcontext():
            code = loft.main(arguments, prog_name=program, complete_var="_LOFT_COMPLETE", standalone_mode=False, obj=job)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as problem:
        if announced_rank() == 0:
            tell(problem.format_message(), error=True)
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
    except ImportError as problem:
        if (problem.name or "").startswith("loft_hpc"):  # a defect of ours, that no set-up mends
            return _fail(job, "unexpected failure\n" + traceback.format_exc(), 1)
        return _fail(job, _line(what_is_missing(problem)), 1)
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        return _fail(job, _line(f"{where}{problem.strerror or problem}: fix the path, its permissions or the space on its disk"), 1)
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
        tell(f"loft: {message}", error=True)
    elif not together:
        tell(f"loft: rank {rank}: {message}", error=True)
    elif world is None:
        time.sleep(RANK_0_SPEAKS_SECONDS)
        if not everywhere:
            tell(f"loft: rank {rank}: {message}", error=True)
    if not together:
        time.sleep(LINE_ARRIVES_SECONDS)
        world.abort(code)
    return code


if __name__ == "__main__":
    main()
