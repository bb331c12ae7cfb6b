"""Runs, tickets, sweeps and clusters that other people made: whatever their files hold, a command ends in time, in one line, and
touches nothing that is not its own.

A few hundred examples, the same each time, are part of the tests. For hours of others: pytest tests/test_fuzz.py --hypothesis-profile long
(tests/conftest.py has the profiles).
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import FILES, WRITING, Told, command, contents, make_original, run, spoil


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_original(folder)
    return folder


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the copies lie, and where commands are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("playground"))
        yield Path.cwd()


def check(told: Told) -> None:
    """What every command promises, whatever it was given."""
    assert told.code in (0, 1, 2), told
    assert "Traceback" not in told.err and "unexpected failure" not in told.err, told.err
    assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", told.out + told.err), told
    if told.code:
        assert re.fullmatch(r"loft: [^\n]+\n", told.err), told.err


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_spoilt_files(original: Path, playground: Path, name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=playground) as made:
        folder = Path(made) / "files"
        shutil.copytree(original, folder, symlinks=True)
        for file in data.draw(st.lists(st.sampled_from(FILES[name]), min_size=1, max_size=3, unique=True)):
            if not any(parent.is_symlink() for parent in (folder / file).parents):
                spoil(data.draw, folder / file)
        own = [str(Path("files") / place) for place in WRITING.get(name, ())]
        before = contents(Path(made), without=own)
        told = run(*command(name, folder))
        check(told)
        after = contents(Path(made), without=own)
        for place in own:
            after.pop(place, None), before.pop(place, None)
        assert after == before
