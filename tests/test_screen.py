"""What is printed, and what becomes of a command whose output nobody takes: no reader, no disk, no stream, no such characters."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from hypothesis import given
from hypothesis import strategies as st

import loft_hpc
from loft_hpc.cli.commands import COMMANDS
from loft_hpc.cli.main import loft as loft_command
from loft_hpc.cli.main import run
from loft_hpc.comm import installed, launch
from loft_hpc.errors import LoftError
from loft_hpc.screen import LastingOutput, printable, tell, without_surrogates

LOFT = (sys.executable, "-m", "loft_hpc")
TRAINING = ("pretrain", "--model", "resnet20", "--rounds", "2", "--local-iterations", "1", "--statistics-batches", "1")
READER_GONE = "reader gone"
WAYS = {READER_GONE: 141, ">/dev/full": 1, ">&-": 0, "2>&-": 0, ">&- 2>&- <&-": 0, ">&- 2>/dev/full": 0}
"""How standard streams may be broken, and the exit code of a command that does nothing but print."""


def start(way: str, *command: str) -> subprocess.CompletedProcess:
    """A command with streams that are broken in that way."""
    reading, writing = os.pipe()
    os.close(reading)
    redirected = command if way == READER_GONE else ("sh", "-c", f'exec "$@" {way}', "sh", *command)
    try:
        return subprocess.run(
            redirected, stdout=writing if way == READER_GONE else subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=240
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("way", WAYS)
def test_a_command_that_prints_ends_quietly(way):
    done = start(way, *LOFT, "--help")
    assert done.returncode == WAYS[way]
    assert done.stderr == ("loft: standard output cannot be written to (No space left on device): free space or name another file\n" if
                           way == ">/dev/full" else "")  # fmt: skip


@pytest.mark.parametrize("way", [READER_GONE, ">/dev/full", ">&- 2>&- <&-"])
def test_a_training_outlives_the_reader_of_its_output(tmp_path, way):
    path = tmp_path / "run"
    done = start(way, *LOFT, *TRAINING, "--run", str(path))
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert json.loads((path / "run.json").read_text())["status"] == "done"
    for line in (path / "metrics.jsonl").read_text().splitlines():  # no other file took the place of a closed stream
        json.loads(line)


def test_errors_are_never_written_to_standard_output():
    done = start("2>&-", *LOFT, "pretrian")
    assert done.returncode == 2 and done.stdout == ""


def test_what_cannot_be_written_is_dropped_and_the_reason_kept():
    reading, writing = os.pipe()
    output = LastingOutput(writing)
    assert output.write(b"heard") == 5 and os.read(reading, 9) == b"heard" and output.problem is None
    os.close(reading)
    assert output.write(b"unheard") == 7 and isinstance(output.problem, BrokenPipeError)
    assert output.write(b"still") == 5
    os.close(writing)


@given(
    st.text(st.characters(), max_size=20) | st.binary(max_size=20).map(os.fsdecode),
    st.sampled_from(["ascii", "latin-1", "utf-8", "cp1252", "shift_jis"]),
)
def test_any_text_can_be_printed_in_any_encoding(text, encoding):
    """Names of files are any bytes, which Python holds as halves of surrogate pairs."""
    before, written = sys.stdout, io.BytesIO()
    sys.stdout = stream = io.TextIOWrapper(written, encoding, newline="\n")
    try:
        tell(text)
        tell(json.dumps(without_surrogates({text: [text]})))
        stream.flush()
    finally:
        sys.stdout = before
    lines = written.getvalue().decode(encoding).split("\n")
    assert all(letter.isprintable() for letter in "".join(lines)) and lines[-1] == ""
    name, values = next(iter(json.loads(lines[-2]).items()))
    assert values == [name]
    name.encode()  # no half of a pair


def test_bytes_that_are_no_text_are_shown_as_bytes():
    assert printable(os.fsdecode(b"caf\xe9\x1b[2J")) == "caf\\xe9\\x1b[2J"


def test_all_writing_to_the_screen_is_in_one_place():
    for file in sorted(Path(loft_hpc.__file__).parent.rglob("*.py")):
        if file.name in ("screen.py", "__main__.py"):
            continue
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"} & set(calls), file


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("click", ["--help"]), ("torch", ["pretrain", "--help"]), ("torch", ["prune", "x"]), ("numpy", ["theory"]),
     ("matplotlib", ["commcost", "--plot", "costs.pdf"])],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named_in_one_line(tmp_path, package, arguments):
    """Python refuses to import it, as where it is not there."""
    program = f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'loft'; from loft_hpc.__main__ import main; main()"
    if package == "matplotlib":
        program = program.replace("sys.modules[", "from importlib import util; util.find_spec = lambda name: None; sys.modules[")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert done.returncode == 1 and lines == [
        f"loft: {package} is not installed for this Python: run bin/setup in the checkout and source .venv/bin/activate, or pip install {package}"
    ]


def completions(*words: str) -> list[str]:
    return [item.value for item in ShellComplete(loft_command, {}, "loft", "_LOFT_COMPLETE").get_completions(list(words[:-1]), words[-1])]


def test_a_shell_completes_commands_options_and_choices():
    assert completions("") == list(COMMANDS)
    assert completions("pre") == ["pretrain"] and completions("zz") == []
    assert "--model" in completions("pretrain", "--mo") and "--finder" not in completions("prune", "--mo")
    assert completions("pretrain", "--strategy", "") == ["loft", "data-parallel", "gpipe"]
    assert completions("pretrain", "--plot", "no-such-option") == []


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "PDF"])
def test_a_plot_is_what_its_ending_says_and_the_same_each_time(tmp_path, ending):
    files = [tmp_path / "new" / f"{number}.{ending}" for number in range(2)]
    for file in files:
        assert run(["commcost", "--workers", "2,4", "--plot", str(file)]) == 0
    first, second = (file.read_bytes() for file in files)
    assert first == second and {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<svg"}[ending.lower()] in first


@pytest.mark.parametrize("place", ["{}/file/x.png", "/proc/x.pdf", "{}/folder.png", "{}/" + 300 * "x" + ".svg"])
def test_a_place_where_no_plot_can_be_written_is_refused_before_the_work(tmp_path, capsys, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(["sweep", "no-run-at-all", "--plot", place.format(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "cannot be written" in said.err and len(said.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", ["prterun has detected an attempt to run as root.", "error while loading shared libraries: libprrte.so"])
def test_an_mpirun_that_starts_nothing_is_not_ok(tmp_path, monkeypatch, words):
    program = tmp_path / "mpirun"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "mpirun (Open MPI) 9" && exit 0\necho "{words}" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = installed.launcher()
    assert words in found.problem and ("export OMPI_ALLOW_RUN_AS_ROOT=1" in found.remedy) == ("root" in words)
    program.write_text("#!/bin/sh\nexit 127\n")
    assert installed.launcher().problem and installed.launcher().remedy


@pytest.mark.parametrize("home", [None, ""])
def test_without_home_the_start_is_refused_before_mpi_is(monkeypatch, home):
    """Open MPI would end the process from inside, in words of its own."""
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    with pytest.raises(LoftError, match="export HOME=/"):
        launch.refuse_without_home()
