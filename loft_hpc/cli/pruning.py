"""Options of the ticket finders: every field of their settings is one, so that a new finder needs no line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import click

from loft_hpc.tickets import finders  # noqa: F401 (they register themselves)
from loft_hpc.tickets.pruning import FINDERS, Finder, Pruning, all_options

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def _help(owners: list[tuple[Finder, Any]]) -> str:
    text = next((known.metadata["help"] for _, known in owners if known.metadata["help"]), "")
    defaults: dict[str, list[str]] = {}
    for finder, known in owners:
        if known.default is not None:
            defaults.setdefault(f"{known.default:g}" if isinstance(known.default, float) else str(known.default), []).append(finder.name)
    choices: dict[tuple[str, ...], list[str]] = {}
    for finder, known in owners:
        choices.setdefault(known.metadata["choices"], []).append(finder.name)
    listed = "; ".join(f"{', '.join(names)}: {', '.join(options)}" for options, names in choices.items() if options)
    shown = "; ".join(f"{value} for {', '.join(names)}" for value, names in defaults.items())
    belongs = "" if shown else f"for {', '.join(finder.name for finder, _ in owners)}"
    return "  ".join(part for part in (text, f"({listed})" if listed else "", f"[default: {shown}]" if shown else f"[{belongs}]") if part)


def finder_options(command: Callable) -> Callable:
    """--method, and the options of all methods."""
    for name, owners in reversed(all_options().items()):
        finder, known = owners[0]
        hint = str(get_type_hints(finder.options)[known.name])
        kind = next((_TYPES[key] for key in _TYPES if key in hint), str)
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, default=None, help=_help(owners))(command)
    methods = "; ".join(f"{finder.name}: {finder.help}" for finder in FINDERS.values())
    return click.option(
        "--method", type=click.Choice(sorted(FINDERS)), default="magnitude", show_default=True, help=f"How a ticket is found. {methods}."
    )(command)


def emptied_line(what: str, layers: Sequence[str]) -> str:
    """That a ticket of weights keeps none of some layers."""
    return f"{what} keeps no weight of {len(layers)} layer{'s' * (len(layers) > 1)}: {', '.join(layers)}"


def prunings_of(ratios: tuple[float, ...], options: dict[str, Any]) -> list[Pruning]:
    """One for each ratio, out of a command's options; those that were not given are left to the method."""
    given = {name: options[name] for name in all_options() if options.get(name) is not None}
    return [Pruning.of(ratio, options["method"], **given) for ratio in ratios]
