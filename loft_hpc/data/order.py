"""Which training images a rank sees at which step: a pure function of (seed, rank, step), so any step can be resumed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loft_hpc import seeds
from loft_hpc.errors import LoftError

SHARINGS = ("replicated", "sharded", "split")


@dataclass(frozen=True)
class Order:
    """The batches of one rank.

    `replicated`: every rank walks all images in an order of its own, `batch_size` at a step (LoFT's release).
    `sharded`: an epoch's permutation, common to all ranks, is cut into disjoint equal shards; `batch_size` per rank and step.
    `split`: a common permutation; each global batch of `batch_size` is split over the ranks (data-parallel training).
    An incomplete last batch is dropped.
    """

    sharing: str
    images: int
    batch_size: int
    seed: int
    rank: int
    size: int
    _epochs: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.sharing not in SHARINGS:
            raise ValueError(f"unknown sharing {self.sharing!r}")
        smallest = self.batch_size // self.size if self.sharing == "split" else self.batch_size
        if smallest < 2:
            raise LoftError(
                f"--batch-size {self.batch_size} over {self.size} ranks leaves one with {smallest} images, and normalisation needs 2: raise it",
                usage=True,
            )
        if self.steps_per_epoch < 1:
            share = f"a rank's share of {self.images // self.size} images" if self.sharing == "sharded" else f"{self.images} images"
            raise LoftError(f"--batch-size {self.batch_size} is larger than {share}: lower it", usage=True)

    @property
    def steps_per_epoch(self) -> int:
        images = self.images // self.size if self.sharing == "sharded" else self.images
        return images // self.batch_size

    @property
    def images_per_step(self) -> int:
        """Images of all ranks together at a step."""
        return self.batch_size if self.sharing == "split" else self.batch_size * self.size

    def indices(self, step: int) -> Tensor:
        """Images of this rank at `step` (counted from 0 over all epochs), as an int64 tensor."""
        epoch, place = divmod(step, self.steps_per_epoch)
        permutation = self._permutation(epoch)
        if self.sharing == "sharded":
            permutation = permutation[self.rank :: self.size]
        batch = permutation[place * self.batch_size : (place + 1) * self.batch_size]
        return batch[self.rank :: self.size] if self.sharing == "split" else batch

    def in_parts(self, parts: int | None) -> list["Order"]:
        """This rank's share of a `split` order whose batches are always cut into `parts`, however many ranks there are.

        Part g belongs to rank g % size, so what a part holds, and how it is augmented and normalised, does not depend on the ranks.
        None: one part for each rank. Raises LoftError where a rank would have none.
        """
        if parts is None:
            return [self]
        if parts < self.size:
            raise LoftError(f"--batch-parts {parts} leaves some of {self.size} ranks without a part of a batch: give at least {self.size}")
        if self.sharing != "split":
            raise ValueError(f"{self.sharing} batches have no parts")
        return [Order("split", self.images, self.batch_size, self.seed, part, parts) for part in range(self.rank, parts, self.size)]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs.clear()
            who = (self.rank,) if self.sharing == "replicated" else ()
            self._epochs[epoch] = torch.randperm(self.images, generator=seeds.generator(self.seed, "order", epoch, *who))
        return self._epochs[epoch]
