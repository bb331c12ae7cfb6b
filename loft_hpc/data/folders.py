"""ImageNet and other image folders: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, decoded by a torchvision loader."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL.Image import DecompressionBombError
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loft_hpc import seeds
from loft_hpc.data.dataset import Batch, DataInfo, DataSet, calibration_indices
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import stem_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Key = tuple[str, int, int | None]
"""(split, image, seed of its random choices); no seed for an image that is not augmented."""


class FolderDataSet(DataSet):
    """Images read from disk as they are needed.

    Training: a random resized crop of `size` and a flip; otherwise the shorter side resized to size * 256 / 224 and the centre
    cropped (the usual ImageNet recipe).
    """

    def __init__(self, name: str, folder: Path, size: int, loader_workers: int, device: torch.device):
        train, test = _open(name, folder, "train"), _open(name, folder, "val")
        if train.classes != test.classes:
            raise LoftError(f"{folder}/train and {folder}/val hold different classes: give both the same folders")
        images = _Images({"train": train, "val": test}, size)
        # Evaluations come in the middle of the training, whose loader goes on reading ahead meanwhile.
        self._training, self._evaluating = (_Loader(images, loader_workers, device) for _ in range(2))
        self._device = device
        self._train_targets = torch.tensor(train.targets)
        self._stream: tuple[Order, int, Iterator[Batch]] | None = None
        names = hashlib.sha256()
        for split in (train, test):
            for path, _ in split.samples:
                names.update(str(Path(path).relative_to(folder)).encode())
        self.info = DataInfo(
            name=name,
            num_classes=len(train.classes),
            channels=3,
            image_size=size,
            stem=stem_for(size),
            train_images=len(train),
            test_images=len(test),
            fingerprint=names.hexdigest(),
        )

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        running, next_step, stream = self._stream or (None, 0, iter(()))
        if running != order or next_step != first_step:
            stream = self._training.batches(_training_keys(order, first_step))
        for step in range(first_step, first_step + steps):
            self._stream = (order, step + 1, stream)
            yield next(stream)

    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[torch.Tensor]:
        for step in range(first_step, first_step + steps):
            yield self._train_targets[order.indices(step)].to(self._device)

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = calibration_indices(self.info.train_images, batches, batch_size)[rank::size]
        return self._evaluating.batches([("train", index, None) for index in batch.tolist()] for batch in mine)

    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = range(self.info.test_images)[rank::size]
        starts = range(0, len(mine), batch_size)
        return self._evaluating.batches([("val", index, None) for index in mine[start : start + batch_size]] for start in starts)


def _training_keys(order: Order, first_step: int) -> Iterator[list[Key]]:
    """The batches of every step from `first_step` on, without end: one loader serves all rounds."""
    for step in itertools.count(first_step):
        batch = order.indices(step).tolist()
        yield [("train", index, seeds.derive(order.seed, "augment", step, order.rank, place)) for place, index in enumerate(batch)]


class _Loader:
    """torch's DataLoader with processes that outlive a pass, since starting them costs seconds.

    They are spawned: forking beside a running MPI is not safe.
    """

    def __init__(self, images: "_Images", workers: int, device: torch.device):
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
        self._keys.source = keys
        for batch in self._loader:
            if isinstance(batch, str):
                raise LoftError(batch)
            pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
            yield pixels.contiguous(memory_format=torch.channels_last), labels


class _Keys:
    """The batch sampler of a loader: whatever is to be read next."""

    def __init__(self) -> None:
        self.source: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.source)

    def __getstate__(self) -> dict:
        return {}  # worker processes get a copy of the loader's parts and need none of this


class _Images(Dataset):
    """Looks up keys: an image's random choices follow from the key's seed alone, in whichever process they are made."""

    def __init__(self, splits: dict[str, ImageFolder], size: int):
        self._splits = splits
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        centre = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        self._augmented = v2.Compose([v2.ToImage(), *crop, *finish])
        self._plain = v2.Compose([v2.ToImage(), *centre, *finish])

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int] | str:
        split, index, seed = key
        path, label = self._splits[split].samples[index]
        try:
            image = self._splits[split].loader(path)
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as problem:  # Pillow, on files missing, torn, or no images
            return f"the image {path} cannot be read ({problem}): restore or remove it"
        if seed is None:
            return self._plain(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._augmented(image), label


def _stack(samples: list) -> Batch | str:
    """A batch; or, of a batch with an unreadable image, the sentence about it (an exception would arrive with a traceback)."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def _open(name: str, folder: Path, split: str) -> ImageFolder:
    if not (folder / split).is_dir():
        raise LoftError(
            f"no {name} in {folder} (looked for {folder / split}/CLASS/IMAGE): name the folder that holds train/ and val/ with --data-dir"
        )
    try:
        return ImageFolder(folder / split)
    except (FileNotFoundError, PermissionError) as problem:
        raise LoftError(
            f"{folder / split} holds no readable classes ({str(problem).splitlines()[0]}): one folder of images for each class"
        ) from None
