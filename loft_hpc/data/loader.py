"""Images from disk to the training device: decoded and cropped in processes of their own, sent as bytes, normalised in batches."""

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.Image import DecompressionBombError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from loft_hpc import seeds
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.dataset import Batch
from loft_hpc.data.index import Index
from loft_hpc.data.tars import TarReader
from loft_hpc.errors import LoftError

Key = tuple[str, int, tuple[int, ...] | None]
"""(split, image, the seed of its random choices and where in the training it stands); None for an image that is not augmented."""

BROKEN = (OSError, ValueError, SyntaxError, EOFError, DecompressionBombError)
"""What Pillow raises on files that are missing, torn, or no images."""

NORMALISATION = Augmentation(padding=0, flip=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Images(Dataset):
    """Looks up keys: an image's random choices follow from its key alone, in whichever process they are made.

    With a seed: a random resized crop of `size` and a flip. Without: the shorter side resized to size * 256 / 224 and the centre cropped
    (the usual ImageNet recipe, on Pillow's images).
    """

    def __init__(self, folder: Path, splits: Mapping[str, Index], size: int):
        self._folder, self._splits = folder, splits
        self._tars = {split: TarReader(folder, index) for split, index in splits.items() if index.in_tars}
        self._augmented = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
        self._plain = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int] | str:
        """(pixels (size, size, 3), label), or the sentence about an image that cannot be read."""
        split, number, place = key
        index = self._splits[split]
        try:
            image = decode(self._content(split, number))
        except BROKEN as problem:
            return f"the image {self._folder / index.names[number]} cannot be read ({problem}): restore or remove it"
        if place is None:
            return np.asarray(self._plain(image)), int(index.labels[number])
        seed, *where = place
        with _drawing(seeds.derive(seed, "augment", *where)):
            return np.asarray(self._augmented(image)), int(index.labels[number])

    def _content(self, split: str, number: int) -> bytes:
        if split in self._tars:
            return self._tars[split].read(number)
        return (self._folder / self._splits[split].names[number]).read_bytes()


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """torchvision's transforms draw from torch's global generator: lend it a seed, and leave it as it was.

    torch's own fork_rng and manual_seed see to GPUs too, and take 7 % of the time that an image does.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def decode(content: bytes) -> Image.Image:
    """An image file's pixels, RGB."""
    image = Image.open(io.BytesIO(content))
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _stack(samples: list) -> Batch | str:
    """(N, size, size, 3) bytes with labels; or, of a batch with an unreadable image, the sentence about it.

    An exception would arrive with a traceback.
    """
    for sample in samples:
        if isinstance(sample, str):
            return sample
    return torch.from_numpy(np.stack([pixels for pixels, _ in samples])), torch.tensor([label for _, label in samples])


class Loader:
    """torch's DataLoader with processes that outlive a pass, since starting them costs seconds.

    They are spawned: forking beside a running MPI is not safe. A batch is the same bit by bit, however many there are.
    """

    def __init__(self, images: Images, workers: int, device: torch.device):
        self._device = device
        self._keys = _Keys()
        self._loader = DataLoader(
            images,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=device.type == "cuda",
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def batches(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """The images of each list of keys, (N, 3, size, size) float32 normalised and channels last, with labels, on the device.

        Raises LoftError where an image cannot be read, or where one of the processes was killed.
        """
        self._keys.source = keys
        batches = map(self._on_device, self._read())
        return _ahead(batches, self._device) if self._device.type == "cuda" else batches

    def _read(self) -> Iterator[Batch | str]:
        try:
            yield from self._loader
        except RuntimeError as problem:
            if "DataLoader worker" not in str(problem):
                raise
            raise LoftError("a process that reads images was killed (out of memory?): lower --loader-workers") from None

    def _on_device(self, batch: Batch | str) -> Batch:
        if isinstance(batch, str):
            raise LoftError(batch)
        pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return NORMALISATION.test(pixels.permute(0, 3, 1, 2)), labels


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each copied and normalised on a stream of its own while the GPU computes on the one before."""
    stream = torch.cuda.Stream(device)

    def begin() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    coming = begin()
    while coming:
        batch, ready = coming
        coming = begin()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(ready)
        for tensor in batch:
            tensor.record_stream(computing)  # its memory is the side stream's, and must not be reused before it was computed on
        yield batch


class _Keys:
    """The batch sampler of a loader: whatever is to be read next."""

    def __init__(self) -> None:
        self.source: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.source)

    def __getstate__(self) -> dict:
        return {}  # worker processes get a copy of the loader's parts and need none of this
