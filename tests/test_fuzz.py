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
from hypothesis import assume, given
from hypothesis import strategies as st

from hostile import FILES, WRITING, Told, asks_for_a_long_training, command, contents, make_original, run, spoil


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
            if (folder / file).parent.is_dir() and (folder / file).parent.resolve() == (folder / file).parent:
                spoil(data.draw, folder / file)
        if name == "resume" and (folder / "interrupted/run.json").is_file():
            assume(not asks_for_a_long_training(folder / "interrupted/run.json"))
        own = [str(Path("files") / place) for place in WRITING.get(name, ())]
        before = {place: what for place, what in contents(Path(made), without=own).items() if place not in own}
        told = run(*command(name, folder))
        check(told)
        after = contents(Path(made), without=own)
        assert {place: what for place, what in after.items() if place not in own} == before
