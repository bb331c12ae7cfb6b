"""LoFT's own ticket: the largest filters of a network that was trained filter-wise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loft_hpc.errors import LoftError
from loft_hpc.tickets.finders.magnitude import MagnitudeOptions, magnitude
from loft_hpc.tickets.pruning import Found, check_choices, option, register
from loft_hpc.tickets.source import Source


@dataclass(frozen=True)
class LoftOptions:
    round_to: int = option(1, "")

    def __post_init__(self):
        check_choices(self)


@register("loft", "LoFT's: the largest filters of each block of a network trained filter-wise", LoftOptions)
def loft(source: Source, options: LoftOptions, ratios: Sequence[float]) -> Iterator[Found]:
    """`magnitude` by the l2 norm in each block, as on the poster, of a run with `--strategy loft`; what it cost is what that run cost."""
    strategy = source.run.configuration.get("strategy")
    if strategy != "loft":
        raise LoftError(f"{source.run.path} was trained {strategy}, not filter-wise: use --method magnitude, or give a LoFT run")
    yield from magnitude(source, MagnitudeOptions(round_to=options.round_to), ratios)
