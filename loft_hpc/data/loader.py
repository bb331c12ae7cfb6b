"""Images from disk to the training device: decoded and cropped in processes of their own, sent as bytes, normalised in batches."""

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from loft_hpc import seeds
from loft_hpc.data.augment import Augmentation
from loft_hpc.data.catalogue import CHECKED_AT_ONCE
from loft_hpc.data.dataset import Batch, first_line
from loft_hpc.data.index import Index
from loft_hpc.data.leave_out import to_line
from loft_hpc.data.tars import TarReader
from loft_hpc.errors import LoftError

Key = tuple[str, int, tuple[int, ...] | None]
"""(split, image, the seed of its random choices and where in the training it stands); None for an image that is not augmented."""

BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF."""

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
        image = self.read(split, number)
        if isinstance(image, str):
            name = index.names[number]
            return (
                f"the image {self._folder / name} cannot be read ({image}): restore it, and --resume continues a training; "
                f"or start another --run with --leave-out FILE, a list that holds the line {to_line(name)}"
            )
        if place is None:
            return np.asarray(self._plain(image)), int(index.labels[number])
        seed, *where = place
        with _drawing(seeds.derive(seed, "augment", *where)):
            return np.asarray(self._augmented(image)), int(index.labels[number])

    def read(self, split: str, number: int) -> Image.Image | str:
        """An image as its file has it, RGB, or why it cannot be read."""
        try:
            return decode(self._content(split, number))
        except OSError as problem:
            return problem.strerror or first_line(problem)
        except Exception as problem:  # Pillow's readers raise whatever a broken file leads them to
            return first_line(problem)

    def broken(self, workers: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        """Read every image of every split, in so many processes: for a batch at a time its size, and which cannot be read, and why.

        Raises LoftError where one of the processes was killed.
        """
        keys = [(split, number) for split, index in self._splits.items() for number in range(len(index))]
        batches = [keys[start : start + CHECKED_AT_ONCE] for start in range(0, len(keys), CHECKED_AT_ONCE)]
        for found in _read(_loader(_Checked(self), batches, list, workers)):
            yield len(found), [(self._splits[split].names[number], why) for split, number, why in found if why is not None]

    def __len__(self) -> int:
        return sum(map(len, self._splits.values()))

    def _content(self, split: str, number: int) -> bytes:
        if split in self._tars:
            return self._tars[split].read(number)
        return _read_plain(self._folder / self._splits[split].names[number])


def _read_plain(path: Path) -> bytes:
    """As `Path.read_bytes`, in fewer calls. Raises OSError for a pipe or a device, which could be waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no file any more")
        return os.pread(handle, status.st_size, 0)
    finally:
        os.close(handle)


class _Checked(Dataset):
    """Looks up (split, image) and gives (split, image, why it cannot be read or None)."""

    def __init__(self, images: Images):
        self._images = images

    def __getitem__(self, key: tuple[str, int]) -> tuple[str, int, str | None]:
        found = self._images.read(*key)
        return *key, found if isinstance(found, str) else None


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
    """An image file's pixels, RGB with 8 bits; of several images in a file the first. docs/file-formats.md says what becomes of others.

    Raises OSError or ValueError, or what else Pillow raises on files that are torn or no images, and ValueError for pixels whose
    range nobody knows.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow knows" if content else "an empty file") from None
    if image.format == "TIFF" and set(image.tag_v2.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise ValueError("its pixels are signed or no whole numbers: convert it to 8 bits")
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()  # where a file has 16 bits, Pillow takes the upper 8
        return image
    if image.mode[0] in "IF":  # I, I;16, I;16B, ..., F
        return _of_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "RGB" and max(image.info["transparency"]) > 255:
        raise ValueError("16 bits with a transparent colour: convert it to 8 bits")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _of_16_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits by its upper 8, as Pillow does with colours. Its own conversion takes the lowest and clips.

    Raises ValueError where the range of its pixels is another or unknown (12, 32 bits, floating point), and where nothing would be
    left of it: levels of a few bits in a file of 16.
    """
    known = image.format in ("PNG", "PPM", "JPEG2000")  # whose readers scale to 16 bits what has more than 8
    if image.format == "TIFF":
        known = tuple(image.tag_v2.get(BITS, ())) == (16,) and image.tag_v2.get(PHOTOMETRIC) == 1  # black is 0
    if image.mode == "F" or not known:
        raise ValueError(f"pixels of more than 8 bits whose range is not known (mode {image.mode}): convert it to 8 bits")
    levels = np.array(image)
    if (transparent := image.info.get("transparency")) is not None:
        levels[levels == transparent] = 65535
    grey = (levels >> 8).astype(np.uint8)
    if grey.min() == grey.max() and levels.min() != levels.max():
        raise ValueError(f"16 bits of which only levels {levels.min()} to {levels.max()} are used: spread them, and convert it to 8 bits")
    return Image.fromarray(grey).convert("RGB")


def _stack(samples: list) -> Batch | str:
    """(N, size, size, 3) bytes with labels; or, of a batch with an unreadable image, the sentence about it.

    An exception would arrive with a traceback.
    """
    for sample in samples:
        if isinstance(sample, str):
            return sample
    return torch.from_numpy(np.stack([pixels for pixels, _ in samples])), torch.tensor([label for _, label in samples])


def _loader(images: Dataset, batches: Iterable[list], collate: Callable[[list], Any], workers: int, **details: Any) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
        **details,
    )


def _read(loader: DataLoader) -> Iterator[Any]:
    """Its batches. Raises LoftError where one of its processes was killed."""
    try:
        yield from loader
    except RuntimeError as problem:
        if "DataLoader worker" not in str(problem):
            raise
        raise LoftError("a process that reads images was killed (out of memory?): lower --loader-workers") from None


class Loader:
    """torch's DataLoader with processes that outlive a pass, since starting them costs seconds.

    They are spawned: forking beside a running MPI is not safe. A batch is the same bit by bit, however many there are.
    """

    def __init__(self, images: Images, workers: int, device: torch.device):
        self._device = device
        self._keys = _Keys()
        # One for all passes: torch's allocator keeps memory apart for each stream.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loader = _loader(images, self._keys, _stack, workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0)

    def batches(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """The images of each list of keys, (N, 3, size, size) float32 normalised and channels last, with labels, on the device.

        Raises LoftError where an image cannot be read, or where one of the processes was killed.
        """
        self._keys.source = keys
        batches = map(self._on_device, _read(self._loader))
        return _ahead(batches, self._side) if self._side else batches

    def _on_device(self, batch: Batch | str) -> Batch:
        if isinstance(batch, str):
            raise LoftError(batch)
        pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return NORMALISATION.test(pixels.permute(0, 3, 1, 2)), labels


def _ahead(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """The same batches, each copied and normalised on this stream while the GPU computes on the one before."""

    def begin() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    coming = begin()
    while coming:
        batch, ready = coming
        coming = begin()
        computing = torch.cuda.current_stream(stream.device)
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
