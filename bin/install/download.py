"""For `bin/setup --download FOLDER`: fetches wheels and sources of all that the set-up installs, for this Python and this platform."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# What Horovod's build and its import want.
BUILD = ["setuptools>=77,<81", "wheel", "packaging"]
HOROVOD = ["cloudpickle", "psutil", "pyyaml", "cffi>=1.4", "cmake>=3.20,<4"]


def main(folder: str, engine: str, cluster_mpicxx: str, system_torch: str, extra: str) -> None:
    pins = [line for line in (HERE / "pins.txt").read_text().splitlines() if "==" in line]
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = f"{place}/bin/python"

        def pip(*arguments: str) -> None:
            if subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]).returncode:
                sys.exit("setup: not everything could be fetched\n       see pip's message above")

        def fetch(*arguments: str) -> None:
            pip("download", "--dest", folder, *arguments)

        constraints = Path(place) / "pins.txt"
        constraints.write_text("\n".join(pin for pin in pins if not (system_torch and pin.startswith("torch"))))
        print(f"setup: fetching into {folder}", flush=True)
        pip("install", *BUILD)
        pip("install", "--no-build-isolation", "--no-deps", str(ROOT))
        less = ["without-mpi"] if cluster_mpicxx else []
        listed = subprocess.run([python, str(HERE / "requirements.py"), extra, *less], capture_output=True, text=True, check=True)
        wanted = [line for line in listed.stdout.split() if not (system_torch and line.startswith(("torch>", "torchvision")))]
        fetch(*BUILD)
        fetch("--constraint", str(constraints), *(["--no-deps"] if system_torch else []), *wanted)
        if cluster_mpicxx:
            fetch("--constraint", str(constraints), "--no-binary", "mpi4py", "--no-deps", "mpi4py")
        if engine == "horovod":
            version = next(pin for pin in pins if pin.startswith("horovod"))
            fetch(*HOROVOD)
            fetch("--no-deps", "--no-binary", "horovod", "--no-build-isolation", version)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"setup: {len(list(Path(folder).iterdir()))} files, {size / 1e9:.2f} GB in {folder}: there, bin/setup --offline FOLDER")


if __name__ == "__main__":
    main(*sys.argv[1:])
