"""Turning settings into JSON and back: run.json must say everything that a run was made with."""

import dataclasses
from typing import Any, TypeVar, get_type_hints

from loft_hpc.errors import LoftError

Settings = TypeVar("Settings")


def to_json(settings: Any) -> dict:
    """All fields of a (nested) dataclass."""
    return dataclasses.asdict(settings)


def from_json(kind: type[Settings], fields: dict) -> Settings:
    """The inverse of `to_json`, validated anew. Raises LoftError where fields are missing or of another shape.

    A field that the file does not know takes its default: runs of earlier versions stay readable, so an option that comes later must
    have as its default what was done before.
    """
    try:
        hints = get_type_hints(kind)
        if "snapshots" in hints and "snapshots" not in fields and "snapshot_every" in fields:
            fields = fields | {"snapshots": {"snapshot_every": str(fields["snapshot_every"])}}  # where it stood before
        values = {}
        for field in dataclasses.fields(kind):
            if field.name not in fields and _has_default(field):
                continue
            value = fields[field.name]
            if dataclasses.is_dataclass(hints[field.name]):
                value = from_json(hints[field.name], value)
            elif isinstance(value, list):
                value = tuple(value)
            values[field.name] = value
        return kind(**values)
    except (KeyError, TypeError, AttributeError) as problem:
        raise LoftError(f"not the settings of this program ({type(problem).__name__}: {problem}): restore the file or start anew") from None


def flatten(settings: Any) -> dict[str, Any]:
    """Leaf fields by name, whichever nested dataclass they belong to; the command line's options carry the same names."""
    leaves = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        leaves |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return leaves


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
