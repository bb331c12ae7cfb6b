"""For `bin/setup --torch system`: the version of this Python's torch, or with --folders where its packages lie.

Exit code 1, with a line on standard error, where there is none that loft-hpc can use.
"""

import re
import sys
import sysconfig

OLDEST = (2, 11)

if "--folders" in sys.argv:
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    print("\n".join(dict.fromkeys([*places, *(place for place in sys.path if place.endswith(("site-packages", "dist-packages")))])))
    sys.exit()
try:
    import torch
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as problem:  # a torchvision of another release raises RuntimeError
    sys.exit(f"setup: {str(problem).splitlines()[0]}")
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST:
    sys.exit(f"setup: its torch {torch.__version__} is older than {'.'.join(map(str, OLDEST))}")
print(torch.__version__)
