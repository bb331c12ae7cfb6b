"""Augmentation of whole batches: random crop with padding, and a flip where a mirrored image is still one of its class."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from loft_hpc.data.transfer import to_device


@dataclass(frozen=True)
class Augmentation:
    """Turns stored images into network input.

    Stored images of dtype uint8 become (x / 255 - mean) / std; float images are taken as they are.
    """

    padding: int
    """Pixels of background around a training image, out of which a crop of the old size is drawn; 0 for no crop."""
    flip: bool
    """Whether a training image is mirrored left to right with probability 1/2."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    background: float = 0
    """What a stored image has where there is nothing: 0 for bytes, which is black."""

    def test(self, images: Tensor) -> Tensor:
        """(N, C, H, W) normalised, nothing else; bytes come out channels last."""
        if images.dtype != torch.uint8:
            return images
        pixels = images.permute(0, 2, 3, 1)
        mean, scale = _rows(self.mean, self.std, pixels.shape[2], images.device)
        # Whole rows of W * C bytes at a time: an inner loop over 3 channels costs a CPU three times as much.
        return pixels.flatten(2).float().sub_(mean).mul_(scale).view(pixels.shape).permute(0, 3, 1, 2)

    def train(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """(N, C, H, W) normalised, with a crop and a flip of its own for each image, drawn from `draw`."""
        count, _, height, width = images.shape
        if self.padding:
            offsets = to_device(torch.randint(2 * self.padding + 1, (2, count, 1), generator=draw), images.device)
            padded = F.pad(images, (self.padding,) * 4, value=self.background)
            rows = offsets[0] + torch.arange(height, device=images.device)
            columns = offsets[1] + torch.arange(width, device=images.device)
        else:
            padded = images
            rows = torch.arange(height, device=images.device).expand(count, height)
            columns = torch.arange(width, device=images.device).expand(count, width)
        if self.flip:
            mirrored = to_device(torch.rand(count, 1, generator=draw) < 0.5, images.device)
            columns = torch.where(mirrored, columns.flip(1), columns)
        elif not self.padding:
            return self.test(images)
        # One gather in the channels-last view (N, H, W, C), whose result is channels-last again.
        which = torch.arange(count, device=images.device).view(count, 1, 1)
        pixels = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        return self.test(pixels.permute(0, 3, 1, 2))


@lru_cache(maxsize=16)
def _rows(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is subtracted from a row of `width` pixels, channels together, and then multiplied with it: (width * C,) each."""
    scale = 1 / (255 * torch.tensor(std))
    return (255 * torch.tensor(mean)).repeat(width).to(device), scale.repeat(width).to(device)
