"""A job script for Slurm, read without doing what it is for: its `#SBATCH` lines and its loft commands, in order.

slurm/common.sh tells the commands where LOFT_PLAN is set. Programs are not run meanwhile, and no file is written.
"""

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loft_hpc.errors import LoftError
from loft_hpc.files import read_text

COMMON = "slurm/common.sh"
_FILE_BYTES = 1 << 20
_SECONDS = 20
_SHORT = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "G": "gpus", "J": "job-name"}
# Words between unit separators, a command between group and record separator: nothing else that is printed has them.
_COMMAND = re.compile("\x1d([^\x1d\x1e]*)\x1f\x1e")
# The shell's own commands and variables count. Programs do not, by name (whatever PATH the script sets) or by path, nor
# what redirects into files; of whole groups that do so, the size of files is limited to nothing.
_QUIETLY = """
command_not_found_handle() { :; }
trap "" XFSZ; ulimit -f 0; set -C -T; shopt -s extdebug
trap 'PATH=/dev/null; case $BASH_COMMAND in
    *">"[!"&"]*) false ;;
    *) case ${BASH_COMMAND%%[ =]*} in */*) false ;; esac ;;
esac' DEBUG
. "$0"
"""


@dataclass(frozen=True)
class JobScript:
    """What a job script asks Slurm for, and what it would do."""

    path: Path
    nodes: int | None
    """None where the script does not say."""
    workers: int
    ranks_per_node: int | None
    gpus: int
    """On all nodes together."""
    commands: list[list[str]]
    """Words of each loft command, without `loft` and its launcher."""


def read_script(path: Path, environment: Mapping[str, str], folder: Path) -> JobScript:
    """The script as `sbatch` would start it in `folder` with these variables.

    Raises LoftError where it is none of ours, or fails.
    """
    if not path.is_file():
        raise LoftError(f"{path} is no job script: give a file like slurm/imagenet.sh", usage=True)
    text = read_text(path, _FILE_BYTES)
    if not re.search(rf"^[^#\n]*{re.escape(COMMON)}", text, re.MULTILINE):
        raise LoftError(
            f"{path} does not source {COMMON}, which tells what a job does: give a script like slurm/imagenet.sh",
            usage=True,
        )
    asked = sbatch_options(text)

    def number(name: str) -> int | None:
        value = asked.get(name)
        found = re.match(r"\d+", value or "")
        if value is not None and not (found and int(found[0])):
            raise LoftError(f"{path}: #SBATCH --{name}={value} is no number of them: correct it, or give --workers")
        return int(found[0]) if value is not None else None

    nodes, ranks, per_node = number("nodes"), number("ntasks"), number("ntasks-per-node")
    workers = ranks or (nodes or 1) * (per_node or 1)
    if per_node is None and nodes and not ranks:
        per_node = 1
    gpus = _gpus(asked, nodes or 1, workers)
    # BASH_ENV names a file that bash would run first
    variables = {name: value for name, value in environment.items() if name != "BASH_ENV"}
    made = _commands(path, variables | _slurm(asked, path, workers, nodes, folder), folder)
    return JobScript(path, nodes, workers, per_node or (-(-workers // nodes) if nodes else None), gpus, made)


def sbatch_options(text: str) -> dict[str, str]:
    """Long options of the `#SBATCH` lines before the first command, with their values; the last of several."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        while words:
            word = words.pop(0)
            if match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", word):
                name, value = match[1], match[2]
            elif match := re.fullmatch(r"-(\w)(.*)", word):
                name, value = _SHORT.get(match[1], match[1]), match[2] or None
            else:
                continue
            if value is None and words and not words[0].startswith("-"):
                value = words.pop(0)
            found[name] = value or ""
    return found


def _gpus(asked: Mapping[str, str], nodes: int, workers: int) -> int:
    """GPUs on all nodes together, of whichever option asks for them: 4, a100:4 or, of --gres, gpu:a100:4."""
    for name, times in (("gpus", 1), ("gpus-per-node", nodes), ("gpus-per-task", workers), ("gres", nodes)):
        kind = r"gpu(?::[a-z][\w.-]*)?(?::(\d+))?" if name == "gres" else r"(?:[a-z][\w.-]*:)?(\d+)"
        for value in asked.get(name, "").split(","):
            if match := re.fullmatch(kind, value):
                return times * int(match[1] or 1)
    return 0


def _slurm(asked: Mapping[str, str], path: Path, workers: int, nodes: int | None, folder: Path) -> dict[str, str]:
    """What a script that Slurm starts finds in its environment."""
    checkout = path.resolve().parent.parent
    home = {} if (folder / COMMON).is_file() or not (checkout / COMMON).is_file() else {"LOFT_HOME": str(checkout)}
    return home | {
        "LOFT_PLAN": "1",
        "SLURM_JOB_ID": "JOBID",
        "SLURM_JOB_NAME": asked.get("job-name", path.name),
        "SLURM_JOB_NODELIST": "NODES",
        "SLURM_JOB_NUM_NODES": str(nodes or 1),
        "SLURM_NTASKS": str(workers),
        "SLURM_CPUS_PER_TASK": asked.get("cpus-per-task", "1"),
        "SLURM_SUBMIT_DIR": str(folder),
    }


def _commands(path: Path, environment: Mapping[str, str], folder: Path) -> list[list[str]]:
    shell = ["bash", "--norc", "-c", _QUIETLY, str(path.resolve())]
    settings = {"cwd": folder, "env": dict(environment), "stdin": subprocess.DEVNULL, "timeout": _SECONDS}
    try:
        told = subprocess.run(shell, capture_output=True, check=False, **settings)
    except subprocess.TimeoutExpired:
        raise LoftError(f"{path} did not come to its end within {_SECONDS} s: leave out what waits") from None
    commands = [found.split("\x1f") for found in _COMMAND.findall(told.stdout.decode(errors="surrogateescape"))]
    if told.returncode and not commands:
        lines = told.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else "without a word"
        raise LoftError(f"{path} ends with {told.returncode} before it trains ({why}): correct it")
    return commands
