"""Wall time of a forward pass, a network against the dense one it came from, on this machine."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass of a batch."""

    median_seconds: float
    low_seconds: float
    """Lower quartile."""
    high_seconds: float
    """Upper quartile."""
    repetitions: int
    batch_size: int

    @property
    def throughput(self) -> float:
        """Images per second, at the median."""
        return self.batch_size / self.median_seconds


@torch.no_grad()
def latencies(networks: Sequence[nn.Module], image: tuple[int, int, int], batch_size: int, repetitions: int) -> list[Latency]:
    """Time every network on the same (batch_size, *image) batch, taking turns, so that what else the machine does hits all alike."""
    device = next(networks[0].parameters()).device
    batch = torch.randn(batch_size, *image, device=device).contiguous(memory_format=torch.channels_last)
    samples: list[list[float]] = [[] for _ in networks]
    for turn in range(repetitions + 3):
        for network, sample in zip(networks, samples, strict=True):
            synchronise(device)
            start = time.perf_counter()
            network(batch)
            synchronise(device)
            if turn >= 3:  # the first passes choose algorithms and touch memory
                sample.append(time.perf_counter() - start)
    return [_summary(sample, batch_size) for sample in samples]


def _summary(sample: list[float], batch_size: int) -> Latency:
    low, median, high = statistics.quantiles(sample, n=4)
    return Latency(median, low, high, len(sample), batch_size)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
