"""Turning settings into JSON and back: run.json must say everything that a run was made with."""

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from loft_hpc.errors import LoftError

Settings = TypeVar("Settings")
_MOST = 2**63


def to_json(settings: Any) -> dict:
    """All fields of a (nested) dataclass."""
    return dataclasses.asdict(settings)


def from_json(kind: type[Settings], fields: dict) -> Settings:
    """The inverse of `to_json`, validated anew. Raises LoftError where fields are missing or of another shape.

    A field that the file does not know takes its default: runs of earlier versions stay readable, so an option that comes later must
    have as its default what was done before. What only a command line may order is not taken from a file.
    """
    try:
        if not isinstance(fields, dict):
            raise TypeError(f"{type(fields).__name__} in place of an object")
        hints = get_type_hints(kind)
        if "snapshots" in hints and "snapshots" not in fields and "snapshot_every" in fields:
            fields = fields | {"snapshots": {"snapshot_every": str(fields["snapshot_every"])}}  # where it stood before
        values = {}
        for field in dataclasses.fields(kind):
            if (field.name not in fields and _has_default(field)) or field.metadata.get("ordered"):
                continue
            values[field.name] = _typed(hints[field.name], fields[field.name], field.name)
        return kind(**values)
    except (KeyError, TypeError, AttributeError) as problem:
        raise LoftError(f"not the settings of this program ({type(problem).__name__}: {problem}): restore the file or start anew") from None


def _typed(hint: Any, value: Any, name: str) -> Any:
    """A value out of a file as its field declares it. Raises TypeError for any other, and for numbers that no setting reaches."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    if isinstance(hint, UnionType):
        chosen = type(None) if value is None else next(kind for kind in get_args(hint) if kind is not type(None))
        return _typed(chosen, value, name)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(get_args(hint)[0], item, name) for item in value)
    kinds = (int, float) if hint is float else (hint,)
    if type(value) not in kinds:
        raise TypeError(f"{name} is no {hint.__name__}")
    if isinstance(value, int | float) and not (math.isfinite(value) if type(value) is float else abs(value) < _MOST):
        raise TypeError(f"{name} is out of bounds")
    return value


def flatten(settings: Any) -> dict[str, Any]:
    """Leaf fields by name, whichever nested dataclass they belong to; the command line's options carry the same names."""
    leaves = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        leaves |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return leaves


@dataclasses.dataclass(frozen=True)
class _Changeable:
    """A setting that decides nothing of what a training learns."""

    by_rank: bool
    """Whether each rank may have its own."""


CHANGEABLE = {
    "data_dir": _Changeable(by_rank=True),
    "loader_workers": _Changeable(by_rank=True),
    "device": _Changeable(by_rank=True),
    "download": _Changeable(by_rank=False),
    "checkpoint_every": _Changeable(by_rank=False),
    "keep_checkpoints": _Changeable(by_rank=False),
    "evaluation_batch": _Changeable(by_rank=False),
}
"""Settings that may be others when a run is resumed, and that are no part of a recipe. All others are fixed for a run's life."""


def deciding(settings: Any) -> dict[str, Any]:
    """The leaf fields that decide a result, as lists and numbers as a file has them."""
    return {name: value for name, value in leaves(to_json(settings)).items() if name not in CHANGEABLE}


def agreed(settings: Any) -> dict[str, Any]:
    """The leaf fields that all ranks of a job must have alike."""
    return {name: value for name, value in flatten(settings).items() if name not in CHANGEABLE or not CHANGEABLE[name].by_rank}


def with_leaves(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The same settings but for some leaf fields, whichever nested dataclass they belong to."""
    own = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            own[field.name] = with_leaves(value, values)
        elif field.name in values:
            own[field.name] = values[field.name]
    return dataclasses.replace(settings, **own)


def option_of(name: str) -> str:
    """The option that sets a leaf field."""
    return "--" + {"milestones": "milestone"}.get(name, name.replace("_", "-"))


def leaves(fields: dict) -> dict[str, Any]:
    """The same of what `to_json` gives, tuples as the lists that a file has."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= leaves(value) if isinstance(value, dict) else {name: list(value) if isinstance(value, tuple) else value}
    return found


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
