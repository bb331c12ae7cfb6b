"""Runs tests/ranks under real mpirun: every file there at each of its world sizes. A file says which in its SIZES."""

import re
import sys
from pathlib import Path

import pytest

from launching import launch

FOLDER = Path(__file__).parent / "ranks"


def cases() -> list:
    found = []
    for file in sorted(FOLDER.glob("check_*.py")):
        sizes = re.search(r"^SIZES = \(([\d, ]+)\)", file.read_text(), re.MULTILINE)[1]
        found += [pytest.param(file, int(size), id=f"{file.stem}-{size}") for size in sizes.split(",") if size.strip()]
    return found


@pytest.mark.parametrize(("file", "ranks"), cases())
def test_under_mpirun(file: Path, ranks: int) -> None:
    pytest_here = (
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(FOLDER.parent.parent / ".pytest.ini"),
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-x",
    )
    result = launch(ranks, *pytest_here, str(file), seconds=480)
    assert result.code == 0, f"{result.out[-6000:]}\n{result.err[-2000:]}"
    assert len(re.findall(r"\b\d+ passed", result.out)) == ranks, result.out[-3000:]
