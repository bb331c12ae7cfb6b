"""Recipes by name: TOML files under presets/ that say, with sources, what the options of a row of a results table are."""

from pathlib import Path
from typing import Any

import click

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FOLDER = Path(__file__).parent / "presets"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """A preset's options by command, named as on the command line without the dashes."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def preset_option(*sections: str, partly: bool = False) -> Any:
    """--preset: the values of these sections become the defaults of the command's options; what is typed overrides them.

    `partly`: the command has only some of their options, and the other values decide nothing in it.
    """

    def apply(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
        if name is not None:
            parameters = {flag.lstrip("-"): known.name for known in context.command.params for flag in known.opts}
            preset = read_preset(name)
            values = {
                option: value for section in sections for option, value in preset[section].items() if not partly or option in parameters
            }
            context.default_map = {parameters[option]: value for option, value in values.items()}
        return name

    return click.option(
        "--preset", type=click.Choice(NAMES), metavar="NAME", is_eager=True, expose_value=False, callback=apply,
        help=f"Recipe whose values stand for the defaults; options given as well override it: {', '.join(NAMES)}.",
    )  # fmt: skip
