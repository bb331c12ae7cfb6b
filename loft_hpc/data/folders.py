"""ImageNet and other image folders: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, decoded by a torchvision loader."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loft_hpc import seeds
from loft_hpc.data.dataset import Batch, DataInfo, DataSet, calibration_indices
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderDataSet(DataSet):
    """Images read from disk as they are needed.

    Training: a random resized crop of `size` and a flip; otherwise the shorter side resized to size * 256 / 224 and the centre
    cropped (the usual ImageNet recipe). Loader processes are spawned, since forking beside a running MPI is not safe.
    """

    def __init__(self, name: str, folder: Path, size: int, loader_workers: int, device: torch.device):
        self._device = device
        self._workers = loader_workers
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        centre = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        train = _open(name, folder, "train")
        test = _open(name, folder, "val")
        if train.classes != test.classes:
            raise LoftError(f"{folder}/train and {folder}/val hold different classes: give both the same folders")
        self._train = _Seeded(train, v2.Compose([v2.ToImage(), *crop, *finish]))
        self._calibration = _Seeded(train, v2.Compose([v2.ToImage(), *centre, *finish]))
        self._test = _Seeded(test, v2.Compose([v2.ToImage(), *centre, *finish]))
        names = hashlib.sha256()
        for split in (train, test):
            for path, _ in split.samples:
                names.update(str(Path(path).relative_to(folder)).encode())
        self.info = DataInfo(
            name=name,
            num_classes=len(train.classes),
            channels=3,
            image_size=size,
            stem="imagenet" if size > 64 else "cifar",
            train_images=len(train),
            test_images=len(test),
            fingerprint=names.hexdigest(),
        )

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        keys = (
            [(index, seeds.derive(order.seed, "augment", step, order.rank, place)) for place, index in enumerate(batch.tolist())]
            for step in range(first_step, first_step + steps)
            for batch in (order.indices(step),)
        )
        return self._load(self._train, keys)

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = calibration_indices(len(self._train), batches, batch_size)[rank::size]
        return self._load(self._calibration, ([(index, 0) for index in batch.tolist()] for batch in mine))

    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = torch.arange(len(self._test))[rank::size].split(batch_size)
        return self._load(self._test, ([(index, 0) for index in batch.tolist()] for batch in mine))

    def _load(self, images: "_Seeded", keys: Iterator[list[tuple[int, int]]]) -> Iterator[Batch]:
        loader = DataLoader(
            images,
            batch_sampler=list(keys),
            num_workers=self._workers,
            collate_fn=_stack,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context="spawn" if self._workers else None,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for batch in loader:
            if isinstance(batch, str):
                raise LoftError(batch)
            pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
            yield pixels.contiguous(memory_format=torch.channels_last), labels


class _Seeded(Dataset):
    """Looks up (index, seed): the transform's random choices follow from the seed alone, in whichever process they are made."""

    def __init__(self, source: ImageFolder, transform: v2.Transform):
        self._source = source
        self._transform = transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | str:
        index, seed = key
        path, label = self._source.samples[index]
        try:
            image = self._source.loader(path)
        except (OSError, ValueError, SyntaxError) as problem:  # what Pillow raises for files that are missing, torn, or no images
            return f"the image {path} cannot be read ({problem}): restore or remove it"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._transform(image), label


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
