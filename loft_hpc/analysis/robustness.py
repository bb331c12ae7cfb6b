"""How a network does on test images that an adversary or a camera has spoilt.

Epsilons and corruptions are in pixels from 0 to 1; PixelRange says where those lie in network input. What happens to an image depends on
the image, its number and the network alone, never on its batch or its rank.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from loft_hpc import seeds
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import Batch, DataSet, PixelRange
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import stem_for
from loft_hpc.training.evaluation import Score, score
from loft_hpc.training.settings import Evaluation

ATTACKS = ("fgsm", "pgd")
SEVERITIES = range(1, 6)


@dataclass(frozen=True)
class Attack:
    """An adversary that knows the network and moves every pixel by at most `epsilon`, to raise the cross-entropy.

    `fgsm` (Goodfellow et al., 1412.6572, section 4) takes one step of `epsilon` along the gradient's sign. `pgd` (Madry et al.,
    1706.06083, section 2.1) starts at random within `epsilon` and takes `steps` of `step_size`, back into the ball after each.
    """

    name: str
    epsilon: float
    """L-infinity radius in pixels from 0 to 1, for instance 8 / 255."""
    steps: int = 10
    """Of pgd; fgsm takes one."""
    step_size: float | None = None
    """Of pgd, in pixels from 0 to 1; None for 2.5 * epsilon / steps, which reaches the ball's end from wherever it starts."""

    def __post_init__(self):
        if self.name not in ATTACKS:
            raise LoftError(f"unknown attack '{self.name}': choose one of {', '.join(ATTACKS)}", usage=True)
        if not 0 <= self.epsilon <= 1:
            raise LoftError(f"an attack's epsilon of {self.epsilon} must lie between 0 and 1, the whole pixel range", usage=True)
        if self.steps < 1:
            raise LoftError(f"an attack of {self.steps} steps does nothing: give at least 1", usage=True)
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise LoftError(f"an attack's step size of {self.step_size} must be a finite number above 0", usage=True)

    @property
    def stride(self) -> float:
        """`step_size`, or what stands for None."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size


@dataclass(frozen=True)
class Corruption:
    """One of the common corruptions of Hendrycks and Dietterich (1903.12261, section 3) at a severity from 1 to 5.

    Of their 15 those that need no files of their own, and their Gaussian blur. Constants are those of their CIFAR-10-C (make_cifar_c.py in
    github.com/hendrycks/robustness), above 64 pixels per side those of their ImageNet-C (corruptions.py there). The images are not theirs
    bit by bit: theirs were drawn without a seed, and stored as bytes or JPEG.

    Images that were normalised by themselves (textures) are spread from their darkest pixel (0) to their lightest (1) and, once corrupted,
    normalised by themselves again. So contrast leaves them as they are, and brightness shows in what it clips alone.
    """

    name: str
    severity: int

    def __post_init__(self):
        if self.name not in CORRUPTIONS:
            raise LoftError(f"unknown corruption '{self.name}': choose one of {', '.join(CORRUPTIONS)}", usage=True)
        if self.severity not in SEVERITIES:
            raise LoftError(f"a corruption's severity of {self.severity} must lie between 1 and 5", usage=True)


@dataclass(frozen=True)
class CorruptedAccuracy:
    """Accuracy under corruption, each severity counting alike and each corruption counting alike."""

    by_corruption: dict[str, float]
    """Mean over the severities at hand."""
    mean: float
    """mCA, the mean over the corruptions: 1 minus the paper's mCE, were that not divided by AlexNet's errors."""


def attacked_score(network: nn.Module, data: DataSet, attack: Attack, batch_size: int, world: World) -> Score:
    """How `network`, its statistics in place, does on attacked test images, each seen by one rank. Collective; all ranks get the same."""

    def change(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return attacked(network, images, labels, numbers, attack, data.pixels)

    return score(network, _Changed(data, change), Evaluation(evaluation_batch=batch_size), world)


def corrupted_score(network: nn.Module, data: DataSet, corruption: Corruption, batch_size: int, world: World) -> Score:
    """How `network`, its statistics in place, does on corrupted test images, each seen by one rank. Collective; all ranks get the same."""

    def change(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return data.pixels.to_input(corrupted(data.pixels.to_pixels(images), numbers, corruption))

    return score(network, _Changed(data, change), Evaluation(evaluation_batch=batch_size), world)


def corrupted_accuracy(scores: Mapping[Corruption, Score]) -> CorruptedAccuracy:
    """The summary of any scores under corruption."""
    found: dict[str, list[float]] = {}
    for corruption, score_there in scores.items():
        found.setdefault(corruption.name, []).append(score_there.accuracy)
    means = {name: fmean(accuracies) for name, accuracies in found.items()}
    return CorruptedAccuracy(means, fmean(means.values()))


def attacked(network: nn.Module, images: Tensor, labels: Tensor, numbers: Sequence[int], attack: Attack, pixels: PixelRange) -> Tensor:
    """What `attack` makes of network input (N, C, H, W): within epsilon of it, and pixels still where `pixels` says what these are.

    `network` is taken as it is, and should be in evaluation mode. `numbers` of the images seed where pgd starts.
    """
    lowest, highest = pixels.ball(images, attack.epsilon)
    if attack.name == "fgsm":
        return _ascend(network, images, labels, pixels.step(images, attack.epsilon)).clamp(lowest, highest)
    draws = [torch.rand(images.shape[1:], generator=seeds.generator(0, "attack", number)) for number in numbers]
    away = 2 * torch.stack(draws).to(images) - 1
    found = (images + away * pixels.step(images, attack.epsilon)).clamp(lowest, highest)
    for _ in range(attack.steps):
        found = _ascend(network, found, labels, pixels.step(images, attack.stride)).clamp(lowest, highest)
    return found


@torch.enable_grad()
def _ascend(network: nn.Module, images: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """A `step` along the sign of the gradient of each image's cross-entropy."""
    images = images.detach().requires_grad_()
    # Summed: in evaluation mode no image's loss depends on another's pixels.
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(images), labels, reduction="sum"), images)
    return images.detach() + step * gradient.sign()


def corrupted(pixels: Tensor, numbers: Sequence[int], corruption: Corruption) -> Tensor:
    """What `corruption` makes of pixels (N, C, H, W) from 0 to 1, C being 1 or 3; computed on the CPU. `numbers` of the images seed noise."""
    kind = _KINDS[corruption.name]
    constants = kind.small if stem_for(pixels.shape[-1]) == "cifar" else kind.large
    strength, which = constants[corruption.severity - 1], CORRUPTIONS.index(corruption.name)
    changed = []
    for image, number in zip(pixels.permute(0, 2, 3, 1).double().cpu().numpy(), numbers, strict=True):
        draw = np.random.default_rng(seeds.derive(0, "corruption", which, corruption.severity, number))
        changed.append(np.clip(kind.change(image, strength, draw), 0, 1))
    return torch.from_numpy(np.stack(changed)).to(pixels).permute(0, 3, 1, 2)


Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(H, W, C) pixels from 0 to 1, a constant of the severity, random numbers -> (H, W, C) pixels, yet to be clipped."""


@dataclass(frozen=True)
class _Kind:
    change: Change
    small: tuple[float, ...]
    """The constants of CIFAR-10-C at severities 1 to 5."""
    large: tuple[float, ...]
    """Those of ImageNet-C."""


def _gaussian_noise(image: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    return skimage.util.random_noise(image, "gaussian", rng=draw, var=deviation**2)


def _impulse_noise(image: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    return skimage.util.random_noise(image, "s&p", rng=draw, amount=share)


def _gaussian_blur(image: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    return skimage.filters.gaussian(image, deviation, channel_axis=-1)


def _brightness(image: np.ndarray, added: float, draw: np.random.Generator) -> np.ndarray:
    if image.shape[-1] == 1:
        return image + added
    hsv = skimage.color.rgb2hsv(image)
    hsv[..., 2] = np.minimum(hsv[..., 2] + added, 1)
    return skimage.color.hsv2rgb(hsv)


def _contrast(image: np.ndarray, factor: float, draw: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1))
    return (image - mean) * factor + mean


def _pixelate(image: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    picture = _picture(image)
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BOX)
    return _array(small.resize(picture.size, Image.Resampling.BOX))


def _jpeg_compression(image: np.ndarray, quality: float, draw: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=int(quality))
    return _array(Image.open(file))


def _picture(image: np.ndarray) -> Image.Image:
    content = np.round(255 * image).astype(np.uint8)
    return Image.fromarray(content[..., 0] if content.shape[-1] == 1 else content)


def _array(picture: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(picture)) / 255


_KINDS = {
    "gaussian_noise": _Kind(_gaussian_noise, small=(0.04, 0.06, 0.08, 0.09, 0.10), large=(0.08, 0.12, 0.18, 0.26, 0.38)),
    "impulse_noise": _Kind(_impulse_noise, small=(0.01, 0.02, 0.03, 0.05, 0.07), large=(0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": _Kind(_gaussian_blur, small=(0.4, 0.6, 0.7, 0.8, 1), large=(1, 2, 3, 4, 6)),
    "brightness": _Kind(_brightness, small=(0.05, 0.1, 0.15, 0.2, 0.3), large=(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, small=(0.75, 0.5, 0.4, 0.3, 0.15), large=(0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": _Kind(_pixelate, small=(0.95, 0.9, 0.85, 0.75, 0.65), large=(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": _Kind(_jpeg_compression, small=(80, 65, 58, 50, 40), large=(25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(_KINDS)


class _Changed(DataSet):
    """A data set whose test images are changed before the network sees them."""

    def __init__(self, data: DataSet, change: Callable[[Tensor, Tensor, Sequence[int]], Tensor]):
        self._data, self._change = data, change
        self.info, self.pixels = data.info, data.pixels

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        return self._data.train_batches(order, first_step, steps)

    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[Tensor]:
        return self._data.train_labels(order, first_step, steps)

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        return self._data.calibration_batches(batches, batch_size, rank, size)

    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        numbers = iter(range(self.info.test_images)[rank::size])
        for images, labels in self._data.test_batches(batch_size, rank, size):
            if len(labels):  # a rank beyond the number of images gets an empty batch
                images = self._change(images, labels, list(islice(numbers, len(labels))))
            yield images.contiguous(memory_format=torch.channels_last), labels
