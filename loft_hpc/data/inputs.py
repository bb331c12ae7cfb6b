"""How a network is to be fed: what must travel with it to be deployed without its data set."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from loft_hpc.data.dataset import DataInfo

MAX_IMAGE_SIZE = 1 << 14


@dataclass(frozen=True)
class NetworkInput:
    """Shape and normalisation of a network's input, and the names of its classes. Raises ValueError for what no
    network takes."""

    channels: int
    image_size: int
    """Height and width in pixels."""
    num_classes: int
    classes: tuple[str, ...] = ()
    """Class names by label; empty where labels come as numbers alone."""
    mean: tuple[float, ...] | None = None
    """Network input is (pixel - `mean`) / `std`, channel by channel, of pixels from 0 (black) to 1 (white); None
    where each image is normalised by itself."""
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        for name, most in (("channels", None), ("image_size", MAX_IMAGE_SIZE), ("num_classes", None)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= (most or value):
                raise ValueError(f"no sensible {name}")
        if len(self.classes) not in (0, self.num_classes) or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"no names of {self.num_classes} classes")
        if (self.mean is None) != (self.std is None):
            raise ValueError("a mean without a standard deviation, or the other way round")
        for name, least in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            if values is not None and (len(values) != self.channels or not all(_is_finite(value) and value > least for value in values)):
                raise ValueError(f"no {name} of {self.channels} channels")

    @classmethod
    def of(cls, info: DataInfo) -> "NetworkInput":
        """That of a data set."""
        return cls(**{field.name: getattr(info, field.name) for field in fields(cls)})

    @classmethod
    def from_json(cls, values: Any) -> "NetworkInput":
        """From what `to_json` gave, other entries left aside. Raises ValueError where it is anything else."""
        if not isinstance(values, dict):
            raise ValueError("no description of images")
        missing = [field.name for field in fields(cls) if field.name not in values]
        if missing:
            raise ValueError(f"no {missing[0]}")
        lists = {name: values[name] for name in ("classes", "mean", "std")}
        if not isinstance(lists["classes"], list) or not all(isinstance(lists[name], list | None) for name in ("mean", "std")):
            raise ValueError("no lists of classes, mean and std")
        own = {name: values[name] for name in ("channels", "image_size", "num_classes")}
        return cls(**own, **{name: None if value is None else tuple(value) for name, value in lists.items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def difference(self, other: "NetworkInput") -> str | None:
        """The first field in which another one differs."""
        return next((field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)), None)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False
