"""What a network is, as data: enough to build it, to name its filter groups, and to write into a JSON file."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from loft_hpc.errors import LoftError

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
IMAGENET_WIDTHS = (64, 128, 256, 512)
CIFAR_WIDTHS = (16, 32, 64)
CIFAR_DEPTHS = (20, 32, 44, 56, 110)
STEMS = ("cifar", "imagenet")
MAX_WIDEN = 64
MAX_BLOCKS = 256
MAX_CHANNELS = 1 << 16
MAX_PARAMETERS = 1 << 30
"""Beyond the networks that this program is for; a file that asks for more is refused before anything is allocated."""

MODEL_NAMES = (
    *(f"{family}{depth}" for family in ("resnet", "preresnet", "wideresnet") for depth in IMAGENET_BLOCKS),
    *(f"{family}{depth}" for family in ("resnet", "preresnet") for depth in CIFAR_DEPTHS),
)


@dataclass(frozen=True)
class BlockShape:
    """One residual block: `in_channels` -> hidden filters -> `out_channels`, the first convolution with this stride."""

    name: str
    """Prefix of its parameters, as in torchvision: `layer2.0`."""
    stage: int
    """1 for `layer1`, and so on."""
    in_channels: int
    out_channels: int
    stride: int

    @property
    def changes_shape(self) -> bool:
        """Whether the shortcut needs a 1x1 convolution: the block is strided or widens."""
        return self.stride != 1 or self.in_channels != self.out_channels


@dataclass(frozen=True)
class Architecture:
    """A residual network of basic blocks (two 3x3 convolutions each).

    Sources: He et al. 2016, arXiv 1512.03385 (post-activation; torchvision's names and arrangement) and 1603.05027
    (pre-activation); the pre-activation networks follow LoFT's release: normalisation after the stem, none after the last
    block (facts: the poster's shared parameter counts fit no other arrangement).
    """

    model: str
    """Name that the user gave, for instance `resnet34`."""
    blocks: tuple[int, ...]
    """Residual blocks in each stage."""
    widths: tuple[int, ...]
    """Channels between the blocks of each stage."""
    pre_activation: bool
    widen: float
    """Hidden filters of a block, as a multiple of its stage's width."""
    stem: str
    """`cifar` (3x3, stride 1) or `imagenet` (7x7, stride 2, then a 3x3 max pool of stride 2)."""
    in_channels: int
    num_classes: int

    def __post_init__(self):
        if self.stem not in STEMS:
            raise LoftError(f"unknown stem '{self.stem}': choose one of {', '.join(STEMS)}")
        if len(self.blocks) != len(self.widths) or not self.blocks:
            raise LoftError(f"{len(self.blocks)} stages of blocks and {len(self.widths)} widths do not fit together")
        if not re.fullmatch(r"[\w+.-]{1,64}", self.model, re.ASCII) or self.model.startswith("."):
            raise LoftError(f"'{self.model[:64]}' is no name of a network: letters, digits, - and _ make one")
        if min(self.blocks) < 1 or sum(self.blocks) > MAX_BLOCKS:
            raise LoftError(f"a network has 1 to {MAX_BLOCKS} blocks, some in each stage")
        channels = (*self.widths, self.in_channels, self.num_classes)
        if min(channels) < 1 or max(channels) > MAX_CHANNELS:
            raise LoftError(f"channels and classes of a network are 1 to {MAX_CHANNELS}")
        if not (0 < self.widen <= MAX_WIDEN) or min(self.hidden_widths().values()) < 1:
            raise LoftError(f"--widen {self.widen:g} must leave every block a hidden filter, and be at most {MAX_WIDEN}")
        if self._convolution_weights() > MAX_PARAMETERS:
            raise LoftError(f"this {self.model} has more than {MAX_PARAMETERS:,} parameters: lower --widen")

    def _convolution_weights(self) -> int:
        """Of the blocks, shortcuts left out: nearly all that a network has."""
        hidden = self.hidden_widths()
        return sum(9 * hidden[block.name] * (block.in_channels + block.out_channels) for block in self.block_shapes())

    def block_shapes(self) -> Iterator[BlockShape]:
        """The residual blocks in forward order."""
        channels = self.widths[0]
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True), start=1):
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                yield BlockShape(f"layer{stage}.{index}", stage, channels, width, stride)
                channels = width

    def hidden_widths(self) -> dict[str, int]:
        """Hidden filters of each block, by the block's name."""
        return {block.name: int(block.out_channels * self.widen) for block in self.block_shapes()}

    def block_outputs(self, image_size: int) -> list[tuple[int, int, int]]:
        """What each block hands to the next one for an image of (in_channels, image_size, image_size): (channels, height, width)."""

        def halved(size: int) -> int:
            return (size + 1) // 2  # every strided layer here pads so that odd sizes round up

        size = halved(halved(image_size)) if self.stem == "imagenet" else image_size
        shapes = []
        for block in self.block_shapes():
            size = halved(size) if block.stride == 2 else size
            shapes.append((block.out_channels, size, size))
        return shapes

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Architecture":
        """The inverse of `to_json`. Raises LoftError where a field is missing, of the wrong type or out of bounds."""
        try:
            return cls(
                model=str(fields["model"]),
                blocks=tuple(int(count) for count in fields["blocks"]),
                widths=tuple(int(width) for width in fields["widths"]),
                pre_activation=bool(fields["pre_activation"]),
                widen=float(fields["widen"]),
                stem=str(fields["stem"]),
                in_channels=int(fields["in_channels"]),
                num_classes=int(fields["num_classes"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise LoftError(f"not a description of a network ({type(problem).__name__}: {problem})") from None


def stem_for(image_size: int) -> str:
    """The stem that suits images of so many pixels per side: small ones must not be shrunk at once."""
    return "imagenet" if image_size > 64 else "cifar"


def architecture(model: str, num_classes: int, in_channels: int = 3, stem: str = "cifar", widen: float | None = None) -> Architecture:
    """The network that `model` names, for a data set's classes, channels and stem.

    `widen` multiplies the hidden filters of every block; by default 2 for the wideresnet family and 1 for the others.
    Raises LoftError for an unknown name.
    """
    if model not in MODEL_NAMES:
        raise LoftError(f"unknown model '{model}': choose one of {', '.join(MODEL_NAMES)}")
    family, depth = re.fullmatch(r"([a-z]+)(\d+)", model).groups()
    depth = int(depth)
    if depth in IMAGENET_BLOCKS:
        blocks, widths = IMAGENET_BLOCKS[depth], IMAGENET_WIDTHS
    else:
        blocks, widths = ((depth - 2) // 6,) * 3, CIFAR_WIDTHS
    if widen is None:
        widen = 2 if family == "wideresnet" else 1
    return Architecture(model, blocks, widths, family != "resnet", widen, stem, in_channels, num_classes)
