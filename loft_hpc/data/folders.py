"""ImageNet and other images on disk: `train/` and `val/`, each with a folder for each class, or tars in their place."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from loft_hpc.comm.world import World
from loft_hpc.data.catalogue import SPLITS
from loft_hpc.data.dataset import Batch, DataInfo, DataMissing, DataSet, PixelRange, calibration_indices
from loft_hpc.data.index import Index, fingerprint_of, index_of
from loft_hpc.data.listing import list_split
from loft_hpc.data.loader import NORMALISATION, Images, Key, Loader
from loft_hpc.data.order import Order
from loft_hpc.data.registry import IMAGE_SIZE, DataSettings, DataShape, folder_shape, loader_processes
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import stem_for

NAMED = 3
"""Classes that a message names."""


class FolderDataSet(DataSet):
    """Images read from disk as they are needed. Made by all ranks together: rank 0 lists the images for all."""

    def __init__(self, settings: DataSettings, device: torch.device, world: World):
        folder, name, size = Path(settings.data_dir), settings.dataset, settings.image_size or IMAGE_SIZE
        _refuse_missing(settings)  # on each rank: a node may lack what rank 0 sees
        splits = world.on_root(lambda: _list(folder, settings.leave_out))
        train, test = (splits[split] for split in SPLITS)
        self.images = Images(folder, splits, size)
        # Evaluations come in the middle of the training, whose loader goes on reading ahead meanwhile.
        workers = loader_processes(settings.loader_workers, world)
        self._training, self._evaluating = (Loader(self.images, workers, device) for _ in range(2))
        self._device = device
        self._train_labels = train.labels.long()
        self._stream: tuple[list[Order], int, Iterator[Batch]] | None = None
        self.pixels = PixelRange.normalised(NORMALISATION.mean, NORMALISATION.std)
        self.info = DataInfo(
            name=name,
            num_classes=_number_of_classes(folder, train, test),
            channels=3,
            image_size=size,
            stem=stem_for(size),
            train_images=len(train),
            test_images=len(test),
            fingerprint=fingerprint_of((train, test)),
            classes=tuple(train.classes),
            mean=NORMALISATION.mean,
            std=NORMALISATION.std,
        )

    def train_batches(self, order: Order, first_step: int, steps: int) -> Iterator[Batch]:
        return (batch for (batch,) in self.train_parts([order], first_step, steps))

    def train_parts(self, orders: Sequence[Order], first_step: int, steps: int) -> Iterator[Sequence[Batch]]:
        # one loader reads all parts, in turn: it has one stream of batches at a time
        running, next_step, stream = self._stream or ([], 0, iter(()))
        if running != list(orders) or next_step != first_step:
            stream = self._training.batches(training_keys(orders, first_step))
        for step in range(first_step, first_step + steps):
            self._stream = (list(orders), step + 1, stream)
            yield [next(stream) for _ in orders]

    def train_labels(self, order: Order, first_step: int, steps: int) -> Iterator[torch.Tensor]:
        for step in range(first_step, first_step + steps):
            yield self._train_labels[order.indices(step)].to(self._device)

    def calibration_batches(self, batches: int, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = calibration_indices(self.info.train_images, batches, batch_size)[rank::size]
        return self._evaluating.batches([("train", index, None) for index in batch.tolist()] for batch in mine)

    def test_batches(self, batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        mine = range(self.info.test_images)[rank::size]
        starts = range(0, len(mine), batch_size)
        return self._evaluating.batches([("val", index, None) for index in mine[start : start + batch_size]] for start in starts)


def training_keys(orders: Sequence[Order], first_step: int) -> Iterator[list[Key]]:
    """The batches of every step from `first_step` on, those of all orders one after the other, without end: one loader serves all rounds."""
    for step in itertools.count(first_step):
        for order in orders:
            batch = order.indices(step).tolist()
            yield [("train", index, (order.seed, step, order.rank, place)) for place, index in enumerate(batch)]


def shape_on_disk(settings: DataSettings) -> DataShape:
    """The shape of images on disk by their index, which is not written.

    Raises DataMissing where there are no images, and LoftError as a training would.
    """
    _refuse_missing(settings)
    folder = Path(settings.data_dir)
    splits = _list(folder, settings.leave_out, keep=False)
    train, test = (splits[split] for split in SPLITS)
    return folder_shape(_number_of_classes(folder, train, test), len(train), len(test), settings.image_size)


def _refuse_missing(settings: DataSettings) -> None:
    """Raises DataMissing where there are no images at all, LoftError where a split is missing."""
    folder = Path(settings.data_dir)
    missing = [split for split in SPLITS if not (folder / split).is_dir()]
    if missing:
        kind = DataMissing if len(missing) == len(SPLITS) else LoftError
        raise kind(
            f"no {settings.dataset} in {folder} (looked for {folder / missing[0]} with a folder or a tar for each class, "
            "or shards): name the folder that holds train/ and val/ with --data-dir"
        )


def _list(folder: Path, leave_out: Sequence[str], keep: bool = True) -> dict[str, Index]:
    """Both splits without the images that are left out; `keep`: whether a new index is written.

    Raises LoftError where there is no image of such a name, or none is left.
    """
    splits = {split: index_of(folder, split, list_split, keep) for split in SPLITS}
    for split in SPLITS if leave_out else ():
        try:
            splits[split] = splits[split].without(name for name in leave_out if name.startswith(f"{split}/"))
        except KeyError as problem:
            raise LoftError(f"there is no image {folder / problem.args[0]} to leave out: take its name from the list") from None
        if not len(splits[split]):
            raise LoftError(f"all images of {folder / split} are left out: restore some, and take their names from the list")
    return splits


def _number_of_classes(folder: Path, train: Index, test: Index) -> int:
    """Raises LoftError where the splits name different classes, or where labels given as numbers leave one out."""
    if len(train.classes) and len(test.classes) and train.classes != test.classes:
        ours, theirs = set(train.classes), set(test.classes)
        only = [
            f"{folder}/{split} alone has {_some(names)}" for split, names in (("train", ours - theirs), ("val", theirs - ours)) if names
        ]
        raise LoftError(f"train and val hold different classes ({'; '.join(only)}): give both the same")
    count = len(train.classes) or int(train.labels.max()) + 1
    present = torch.bincount(train.labels, minlength=count) > 0
    if not present.all():
        label = int((~present).nonzero()[0])
        if len(train.classes):
            raise LoftError(
                f"all images of {folder}/train/{train.classes[label]} are left out: restore some, and take their names from the list"
            )
        raise LoftError(f"no image of {folder}/train has the label {label}: labels count from 0, without gaps")
    if len(test.classes) not in (0, count) or int(test.labels.max()) >= count:
        others = len(test.classes) or int(test.labels.max()) + 1
        raise LoftError(f"{folder}/train holds {count} classes and {folder}/val {others}: give both the same")
    return count


def _some(names: Iterable[str]) -> str:
    """The first names of many, and how many there are more."""
    first = sorted(names)
    more = f" and {len(first) - NAMED:,} more" if len(first) > NAMED else ""
    return ", ".join(first[:NAMED]) + more
