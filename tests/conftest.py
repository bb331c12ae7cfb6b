"""For every test: this folder on the path, for the modules that tests share, and how many examples test_fuzz.py tries."""

import sys
from pathlib import Path

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
