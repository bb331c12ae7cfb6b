"""A world of one rank that needs neither MPI nor an engine."""

import os

import torch

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.pulse import Pulse
from loft_hpc.comm.world import World


class Alone(World):
    """What a world of one rank does without MPI: collectives are no work, and rank 0 is here."""

    engine = None

    def __init__(self, like: World | None = None) -> None:
        """`like`: the world of which this rank stays a part, with its share of the cores."""
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.ledger, self.pulse = Ledger(), Pulse()
        self.cores, self.threads = (like.cores, like.threads) if like else (None, None)
        if like:
            self.local_rank = like.local_rank

    def use_device(self, device: torch.device, alone: bool) -> bool:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return True

    def barrier(self) -> None:
        """There is nobody to wait for."""

    wait_quietly = barrier

    def failed_together(self, patience_seconds: float = 3.0) -> bool:
        return True

    def abort(self, code: int = 1) -> None:
        os._exit(code)
