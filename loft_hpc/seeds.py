"""Independent random streams out of one seed. Who draws what is decided here, so that no two draws share a stream by accident."""

import numpy as np
import torch

_STREAMS = ("init", "deal", "order", "augment", "textures", "synthetic", "ticket", "calibration", "theory", "corruption", "attack")


def derive(seed: int, stream: str, *where: int) -> int:
    """A 63-bit seed for a stream at a place, for instance (rank, step): the same everywhere, unrelated to all others."""
    words = [seed & 0xFFFFFFFF, seed >> 32, _STREAMS.index(stream), *where]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, stream: str, *where: int) -> torch.Generator:
    """A CPU generator for a stream at a place."""
    return torch.Generator().manual_seed(derive(seed, stream, *where))
