"""Packages of other people that a user may lack: by which name they are installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

_INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "pynvml": "nvidia-ml-py"}
_BUILT = ("horovod", "mpi4py")
"""What must be built against the machine's MPI, which pip alone does not do."""


def what_is_missing(problem: ImportError) -> str:
    """One line that names the package that does not load, and what to do."""
    package = (problem.name or "").split(".")[0]
    if not isinstance(problem, ModuleNotFoundError) or not package:
        return f"{package or 'a package'} does not load ({' '.join(str(problem).split())}): run bin/setup, and see loft doctor"
    name = _INSTALLED_AS.get(package, package)
    by_hand = "" if package in _BUILT else f", or pip install {name}"
    return f"{name} is not installed for this Python: run bin/setup in the checkout and source .venv/bin/activate{by_hand}"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package, or `missing`."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
