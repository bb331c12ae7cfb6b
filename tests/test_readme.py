"""The README's Python, run in order as a reader would run it, and the commands between that they need."""

import re
import shlex
from pathlib import Path

import pytest

from loft_hpc.cli.main import run

README = Path(__file__).parent.parent / "README.md"
SHORT = ("--epochs", "1", "--batch-size", "512", "--statistics-batches", "2", "--device", "cpu")


def steps() -> list[tuple[str, str]]:
    """Python snippets, and `loft export` commands, in the order of the page."""
    found = re.finditer(r"^```python\n(.*?)^```$|^    (loft export [^\n]*)$", README.read_text(), re.MULTILINE | re.DOTALL)
    return [("python", match[1]) if match[1] else ("command", match[2]) for match in found]


def test_the_snippets_work(tmp_path, monkeypatch, capsys):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert run(["pretrain", "--model", "resnet20", "--widen", "0.25", *SHORT, "--run", "runs/RUN"]) == 0
    assert run(["prune", "runs/RUN", "--ratio", "0.8", "--device", "cpu"]) == 0
    assert run(["retrain", "runs/RUN/tickets/magnitude-l2-0.8", *SHORT, "--run", "runs/RETRAINED"]) == 0
    capsys.readouterr()
    names: dict = {}
    for kind, text in steps():
        if kind == "python":
            exec(compile(text, str(README), "exec"), names)
        else:
            assert run(shlex.split(text, comments=True)[1:]) == 0
    labels = [re.findall(r"\d+", line) for line in capsys.readouterr().out.splitlines() if line.startswith(("[", "tensor"))]
    assert len(labels) == 3 and len(labels[0]) == 5 and labels[0] == labels[1] == labels[2]


def test_what_the_page_says_of_commands_is_there():
    """Each `loft COMMAND` of the page is one."""
    from loft_hpc.cli.main import COMMANDS

    assert set(re.findall(r"\bloft ([a-z]+)\b", " ".join(re.findall(r"`[^`]*`|^    .*$", README.read_text(), re.MULTILINE)))) <= set(
        COMMANDS
    )
