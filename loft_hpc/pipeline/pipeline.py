"""Micro-batches through a row of ranks: GPipe's schedule (Huang et al. 2019, arXiv 1811.06965).

Legend: m micro-batches, K stages; F i, B i: forward and backward of micro-batch i. Fill and drain, here m = 3, K = 3, time to the right:

    rank 0   F0 F1 F2 .  .  .  .  B0 B1 B2
    rank 1   .  F0 F1 F2 .  .  B0 B1 B2 .
    rank 2   .  .  F0 F1 F2 B0 B1 B2 .  .

A rank computes in m of m + K - 1 slots each way; the others are the pipeline's bubble. No rank is told when to do what: it takes up a
micro-batch when its input has come.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loft_hpc.comm.messages import Messages
from loft_hpc.pipeline.stages import Part, Shape, Stage
from loft_hpc.training.stopwatch import Stopwatch


class Pipeline:
    """One rank's stage, with buffers for what comes in, allocated once.

    `arriving` and `leaving` are the (C, H, W) of what one image is at the stage's two ends (None for images and for the output).
    """

    def __init__(
        self, stage: Stage, part: Part, arriving: Shape | None, leaving: Shape | None, micro_batches: int, images: int,
        messages: Messages, rank: int, recompute: bool, autocast: bool, device: torch.device,
    ):  # fmt: skip
        self._part, self._messages, self._rank = part, messages, rank
        self._micro_batches, self._autocast, self._device = micro_batches, autocast, device
        # our networks draw nothing, so there is no generator's state to keep
        self._run = partial(checkpoint, stage, use_reentrant=False, preserve_rng_state=False) if recompute else stage
        size = images // micro_batches
        self._inputs = message_buffers(arriving, size, micro_batches, device)
        self._gradients = message_buffers(leaving, size, micro_batches, device)
        self.waiting = Stopwatch(device)
        """Time spent in waiting for messages."""

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor:
        """Add the gradient of the mean loss over the batch to the stage's parameters; returns that loss (0 but at the last stage).

        `images` (B, C, H, W) at the first stage, `labels` (B,) at the last one.
        """
        inputs = list(images.chunk(self._micro_batches)) if images is not None else [None] * self._micro_batches
        targets = list(labels.chunk(self._micro_batches)) if labels is not None else [None] * self._micro_batches
        coming = self._receive(self._inputs, self._rank - 1, "activation")
        returning = self._receive(self._gradients, self._rank + 1, "gradient")
        sent, total = [], torch.zeros((), device=self._device)
        ends = []
        for i in range(self._micro_batches):
            x = inputs[i] if self._part.begins else self._wait(coming[i]).detach().requires_grad_()
            y = self._forward(x)
            if self._part.ends:
                y = F.cross_entropy(y, targets[i], reduction="sum") / len(labels)
                total += y.detach()
            else:
                sent.append(self._messages.send(_flat(y.detach()), self._rank + 1, i, "activation"))
            ends.append((x, y))
        for i in range(self._micro_batches):
            x, y = ends[i]
            ends[i] = None  # what autograd kept of this micro-batch is needed no longer after it
            y.backward(None if self._part.ends else self._wait(returning[i]))
            if not self._part.begins:
                sent.append(self._messages.send(_flat(x.grad), self._rank - 1, i, "gradient"))
        for wait in sent:
            self._wait(wait)
        return total

    def _forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return self._run(x).float()

    def _receive(self, buffers: Sequence[Tensor], source: int, purpose: str) -> list:
        """Post the receives of all micro-batches, ahead of everything."""
        waits = []
        for i, buffer in enumerate(buffers):
            wait = self._messages.receive(_flat(buffer), source, i, purpose)
            waits.append(lambda wait=wait, buffer=buffer: (wait(), buffer)[1])
        return waits

    def _wait(self, wait) -> Tensor:
        with self.waiting.running():
            return wait()


def message_buffers(shape: Shape | None, images: int, count: int, device: torch.device) -> list[Tensor]:
    """For what comes over one border of a stage, `shape` for one image: a (images, C, H, W) tensor for each of `count` micro-batches."""
    if shape is None:
        return []
    return [torch.empty(images, *shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(count)]


def _flat(tensor: Tensor) -> Tensor:
    """The (N, C, H, W) tensor's memory, channels last, as one row; copied only where it lies otherwise."""
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(-1)
