"""Does memory that CUDA pinned travel between two ranks? Open MPI lets ranks read one another's memory, which not every kernel allows there."""

import torch
from mpi4py import MPI

world = MPI.COMM_WORLD
mine, theirs = (torch.full((1 << 22,), float(world.rank), pin_memory=torch.cuda.is_available()) for _ in range(2))
world.Sendrecv(mine.numpy(), 1 - world.rank, 0, theirs.numpy(), 1 - world.rank, 0)
assert bool((theirs == 1 - world.rank).all())
