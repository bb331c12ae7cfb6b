"""For every test: this folder on the path, for the modules that tests share, and how many examples test_fuzz.py tries."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

_ALWAYS = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # test_fuzz.py has a deadline of its own
settings.register_profile("short", **_ALWAYS, max_examples=12, derandomize=True)
settings.register_profile("long", **_ALWAYS, max_examples=200, derandomize=False)
settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `pytest -n`: all that starts jobs in one process, so that never two of them share the cores; else each file as a whole."""
    for item in items:
        launches = any(getattr(value, "__module__", None) == "launching" for value in vars(item.module).values())
        item.add_marker(pytest.mark.xdist_group("launches" if launches else item.path.name))
