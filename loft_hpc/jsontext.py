"""JSON as its standard has it: NaN and infinity are neither written nor read. The one place where JSON is written."""

import json
import math
from collections.abc import Mapping
from typing import Any

from loft_hpc.errors import LoftError


def to_json_text(value: Any, what: str = "the result", indent: int | None = None, sort_keys: bool = False) -> str:
    """`value` as JSON, without a line break at its end. Raises LoftError, naming the entry, where a number in it is not finite.

    `what`: what the text is for, for that message. Where there is nothing to say of an entry, it is None (`finite_or_none`).
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        raise LoftError(f"{what} would hold {_not_finite(value)}, which is not a number: nothing was written") from None


def from_json_text(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or where a number in it is not finite."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def finite_or_none(value: float | None) -> float | None:
    """For JSON: a number, or None where it is not finite: an interval of a single value, a difference to what is not there."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, place: str = "") -> str:
    """The first entry that is not finite, as `place.of.entry nan`."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{place} {value}".strip()
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for name, item in entries if (found := _not_finite(item, f"{place}.{name}".lstrip(".")))), "")


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which JSON does not know")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"it holds {text[:32]}, which is out of bounds")
    return value
