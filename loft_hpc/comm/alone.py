"""A world of one rank that needs neither MPI nor Horovod."""

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.pulse import Pulse
from loft_hpc.comm.world import World


class Alone(World):
    """What a world of one rank does without MPI: collectives are no work, and rank 0 is here."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.ledger, self.pulse, self.cores, self.threads = Ledger(), Pulse(), None, None

    def barrier(self) -> None:
        """There is nobody to wait for."""
