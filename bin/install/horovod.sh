#!/usr/bin/env bash
# Builds Horovod against the torch and the MPI of the active environment. Called by bin/setup with "yes" for GPU operations over NCCL.
set -euo pipefail
gpu=$1
here=$(cd "$(dirname "$0")" && pwd)
. "$here/say.sh"
version=$(sed -n 's/^horovod==//p' "$here/pins.txt")
patch=$here/horovod-$version.patch
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0  # of the source archive of 0.28.1

# Built already against the same torch, MPI and options: leave it.
built=$( { cat "$here/pins.txt" "$patch" "$0"; echo "$gpu"; mpicxx -show; python --version; python -c "import torch; print(torch.__version__)"; } | sha256sum | cut -d' ' -f1 )
stamp=$VIRTUAL_ENV/.horovod-build
if [ -z "${HOROVOD_WHEEL:-}" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$built" ] && python -c 'import horovod.torch' 2>/dev/null; then
    exit 0
fi
rm -f "$stamp"

pip() { python -m pip --quiet "$@"; }
# What Horovod's build imports, since it is built without isolation to see this very torch.
pip install 'setuptools>=77,<81' wheel packaging cloudpickle psutil pyyaml 'cffi>=1.4' || die "Horovod's build tools did not install" "see pip's message above"
command -v cmake >/dev/null || pip install 'cmake>=3.20,<4' || die "cmake is missing and its wheel did not install" "Debian: apt-get install cmake"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "Horovod $version from source (about two minutes on two cores)"
pip download --no-deps --no-binary horovod --no-build-isolation --dest "$work" "horovod==$version" >"$work/log" 2>&1 ||
    { cat "$work/log" >&2; die "Horovod's source did not download" "see pip's message above"; }
echo "$sha256  $work/horovod-$version.tar.gz" | sha256sum --check --quiet || die "Horovod's source archive is not the known one" "download again"
mkdir "$work/source"
tar -xzf "$work/horovod-$version.tar.gz" -C "$work/source" --strip-components 1
patch --quiet --strip 1 --directory "$work/source" < "$patch" || die "the patch does not apply" "bin/install/horovod-$version.patch belongs to Horovod $version"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1
export MAKEFLAGS=-j${LOFT_BUILD_JOBS:-$(nproc)}
if [ "$gpu" = yes ]; then
    . "$here/cuda.sh"
    export HOROVOD_GPU_OPERATIONS=NCCL
else
    export HOROVOD_CPU_ONLY=1
fi
# HOROVOD_WHEEL names a folder for the wheel, to be installed elsewhere.
make=(install --force-reinstall)
[ -z "${HOROVOD_WHEEL:-}" ] || make=(wheel --wheel-dir "$HOROVOD_WHEEL")
pip "${make[@]}" --no-build-isolation --no-deps --no-cache-dir "$work/source" >"$work/log" 2>&1 ||
    { grep -E 'error|Error|Could not|Unable' "$work/log" | head -n 20 >&2 || true  # grep finds nothing, or head closes the pipe
      log=$VIRTUAL_ENV/horovod-build.log; cp "$work/log" "$log"
      die "Horovod did not compile" "the log is in $log; it needs GCC 11 or newer and a complete MPI${CUDA_HOME:+, and the CUDA of $CUDA_HOME}; or do without it: bin/setup --engine mpi4py"; }
[ -z "${HOROVOD_WHEEL:-}" ] || exit 0
python -c 'import horovod.torch as hvd; assert hvd.mpi_built()' || die "Horovod was built but does not load" "run .venv/bin/python -c 'import horovod.torch' to see why"
echo "$built" > "$stamp"
