"""Runs tests/ranks under real mpirun: every file there at each of its world sizes. A file says which in its SIZES.

All files of a world size share one launch: on four ranks, importing torch takes longer than most checks do.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launching import Launched, launch

FOLDER = Path(__file__).parent / "ranks"


def cases() -> list:
    found = []
    for file in FOLDER.glob("check_*.py"):
        sizes = re.search(r"^SIZES = \(([\d, ]+)\)", file.read_text(), re.MULTILINE)[1]
        found += [(int(size), file) for size in sizes.split(",") if size.strip()]
    return [pytest.param(file, size, id=f"{file.stem}-{size}") for size, file in sorted(found)]


@pytest.fixture(scope="session")
def launched(request) -> Callable[[int], Launched]:
    """The launch of all files that are selected for a world size."""
    done: dict[int, Launched] = {}

    def of(ranks: int) -> Launched:
        if ranks not in done:
            cases = [item.callspec.params for item in request.session.items if item.originalname == "test_under_mpirun"]
            files = [str(case["file"]) for case in cases if case["ranks"] == ranks]
            config = str(FOLDER.parent.parent / ".pytest.ini")
            command = [sys.executable, "-m", "pytest", "-c", config, "--color=no", "-p", "no:cacheprovider", "-x", *files]
            done[ranks] = launch(ranks, *command, seconds=300 + 240 * len(files))
        return done[ranks]

    return of


@pytest.mark.parametrize(("file", "ranks"), cases())
def test_under_mpirun(launched, file: Path, ranks: int) -> None:
    result = launched(ranks)
    seen = re.findall(rf"^ranks: {file.name}: (\d+) passed, (\d+) failed in (\d+) s$", result.out, re.MULTILINE)
    whole = len(seen) == ranks and all(int(passed) and not int(failed) for passed, failed, _ in seen)
    assert whole, f"{file.name} did not pass, or an earlier check ended the job\n{result.out[-6000:]}\n{result.err[-2000:]}"
