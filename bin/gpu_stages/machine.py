"""What the figures were made on, as JSON."""

import json
import os
import platform

import mpi4py
import torch

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
facts = {
    "gpu": gpu,
    "gpus": torch.cuda.device_count(),
    "cpu_cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cudnn": torch.backends.cudnn.version() if gpu else None,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
    "mpi4py": mpi4py.__version__,
}
print(json.dumps(facts, indent=1))
