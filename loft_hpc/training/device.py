"""Which device and how many threads a rank computes with."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass

import torch

from loft_hpc.comm.launch import cpp_compiler, threads_chosen_by_user
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.training.settings import GPU_PRECISIONS


@dataclass(frozen=True)
class Placement:
    """What `place` decided, as it stands in run.json."""

    device: str
    threads: int
    gpus: int
    precision: str
    """Arithmetic of convolutions: float32, tf32 or bfloat16."""
    staged: bool
    """Whether exchange buffers go through pinned host memory."""


def place(wanted: str, precision: str, world: World, compile: bool = False) -> tuple[torch.device, Placement]:
    """Choose this rank's device and its number of threads, and tell `world` about both.

    GPUs go round by local rank. Exchange buffers stay on the GPU only where the engine has NCCL and no two ranks share one. Raises
    LoftError for what is not here: a GPU, or the C++ compiler that is needed to `compile` networks.
    """
    if compile and shutil.which(cpp_compiler()) is None:
        raise LoftError(
            f"--compile needs a C++ compiler, and there is no {cpp_compiler()} here: install it, name one in CXX, or omit --compile"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise LoftError("--device cuda: torch sees no GPU here; check nvidia-smi and `loft doctor`, or use --device cpu")
    gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if precision in GPU_PRECISIONS and not gpus:
        raise LoftError(f"--precision {precision} is for GPUs: omit it on a CPU")
    if gpus:
        precision = "tf32" if precision == "auto" else precision
        exact = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = exact
    else:
        precision = "float32"
    device = torch.device("cuda", world.local_rank % gpus) if gpus else torch.device("cpu")
    direct = world.use_device(device, _gpus_to_themselves(device, world))
    if world.cores is None:
        world.cores = _share_of_cores(world)
        world.threads = threads_chosen_by_user() or world.cores
    threads = world.threads
    torch.set_num_threads(threads)
    return device, Placement(str(device), threads, gpus, precision, bool(gpus) and not direct)


def precision_here(precision: str, device: str) -> str:
    """That precision, or `auto` where it is a GPU's and there is none: for work that goes on with a run of another machine."""
    return "auto" if precision in GPU_PRECISIONS and (device == "cpu" or not torch.cuda.is_available()) else precision


def _gpus_to_themselves(device: torch.device, world: World) -> bool:
    """Whether every rank of the job has a GPU that no other rank uses: NCCL refuses two ranks on one, and all must do alike."""
    mine = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    gpus = world.gather_objects(mine)
    return None not in gpus and len(set(gpus)) == len(gpus)


def _share_of_cores(world: World) -> int:
    """The cores that it may run on, each divided by the ranks of this machine that may run there too.

    Serves bound ranks (each with cores of its own) and unbound ones (all sharing the machine) alike.
    """
    host, mine = os.uname().nodename, os.sched_getaffinity(0)
    claims = Counter(core for name, cores in world.gather_objects((host, mine)) if name == host for core in cores)
    return max(1, int(sum(1 / claims[core] for core in mine) + 1e-6))
