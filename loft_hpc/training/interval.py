"""How often something happens in a training, as the papers write it: `1ep`, `200it`."""

import re
from dataclasses import dataclass

from loft_hpc.errors import LoftError


@dataclass(frozen=True)
class Interval:
    """`count` epochs (`ep`) or steps of a worker (`it`); a count of 0 is never."""

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str | int, option: str) -> "Interval":
        """From `1ep` or `200it`; a bare number is epochs. Raises LoftError, naming the option, for anything else."""
        match = re.fullmatch(r"(\d{1,9})(ep|it)?", str(text))
        if not match:
            raise LoftError(f"{option} {text} is no interval: give epochs or steps, as in 1ep or 200it (0: never)", usage=True)
        return cls(int(match[1]), match[2] or "ep")

    def steps(self, steps_per_epoch: int) -> int:
        """Its length in steps; 0 for never."""
        return self.count * (steps_per_epoch if self.unit == "ep" else 1)


def passes(begin: int, end: int, every: int) -> bool:
    """Whether a multiple of `every` (0: never) lies after step `begin` and not after step `end`."""
    return every > 0 and end // every > begin // every


def next_multiple(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return (step // every + 1) * every
