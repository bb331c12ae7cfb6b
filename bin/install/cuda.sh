# Sourced by horovod.sh for --gpu: names the CUDA and NCCL that Horovod is compiled against.
# A complete toolkit (a CUDA module: CUDA_HOME, or the nvcc on the PATH with its libcudart) is used as it is; with a bare nvcc, folders
# laid out as a toolkit are made of links into the CUDA libraries that torch's wheel brought along.
# The folders stay in the environment: Horovod finds its NCCL and CUDA through them whenever it loads.
links=$VIRTUAL_ENV/share/loft-cuda
rm -rf "$links"
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
[ -x "${nvcc:-}" ] || nvcc=$(command -v nvcc || true)
[ -n "$nvcc" ] || die "--gpu needs the CUDA compiler nvcc" "load a CUDA module of the release that torch was built with ($(python -c 'import torch; print(torch.version.cuda)'))"
nvcc=$(readlink -f "$nvcc")
toolkit=$(dirname "$(dirname "$nvcc")")
# Beside the torch that is imported, which may lie in another environment or behind links.
libraries=$(python - <<'PYTHON'
import os, sys, torch
places = [os.path.dirname(os.path.dirname(torch.__file__)), *sys.path]
print(next((os.path.realpath(found) for place in places if os.path.isdir(found := os.path.join(place, "nvidia"))), "none"))
PYTHON
)

link_library() { # FOLDER FILE: libX.so beside the versioned library that the wheel has
    ln -sf "$2" "$1/$(basename "$2")"
    case $2 in *.so.*) ln -sf "$2" "$1/$(basename "${2%%.so.*}").so" ;; esac
}

if [ -e "$toolkit/lib64/libcudart.so" ] && [ -e "$toolkit/include/cuda_runtime.h" ]; then
    export CUDA_HOME=$toolkit
else
    cuda=$(find -L "$libraries" -maxdepth 1 -name 'cu[0-9]*' 2>/dev/null | head -n 1 || true)
    [ -d "$cuda/include" ] || die "the nvcc in $toolkit has no CUDA runtime beside it, and torch's wheel brought none" "load a complete CUDA module"
    mkdir -p "$links/cuda/lib64"
    ln -s "$cuda/include" "$links/cuda/include"
    ln -s "$(dirname "$nvcc")" "$links/cuda/bin"
    for file in "$cuda"/lib/*.so.* "$cuda"/lib/*.a; do [ -e "$file" ] && link_library "$links/cuda/lib64" "$file"; done
    export CUDA_HOME=$links/cuda LIBRARY_PATH=$links/cuda/lib64:${LIBRARY_PATH:-}
    export CPATH=$cuda/include:$toolkit/include:${CPATH:-}
fi
export CUDAToolkit_ROOT=$CUDA_HOME HOROVOD_CUDA_HOME=$CUDA_HOME

if [ -z "${HOROVOD_NCCL_HOME:-}" ]; then
    [ -e "$libraries/nccl/include/nccl.h" ] || die "NCCL's headers are missing" "install NCCL and set HOROVOD_NCCL_HOME to its folder"
    mkdir -p "$links/nccl/lib"
    ln -s "$libraries/nccl/include" "$links/nccl/include"
    for file in "$libraries"/nccl/lib/libnccl.so.*; do link_library "$links/nccl/lib" "$file"; done
    export HOROVOD_NCCL_HOME=$links/nccl
fi
# The GPU here, else those that today's clusters have (A100, H100).
export HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | grep -xE '[0-9]+' | sort -u | paste -sd, || true)}
export HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-80,90}
