"""A page whose tables and figures a report makes: each stands between two comments, and is replaced as a whole."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


def renew(page: Path, blocks: Mapping[str, str], plots: Path) -> None:
    """Put `blocks` in the places that carry their names, and copy the figures beside the page. Ends the report where a place is missing."""
    text = page.read_text()
    for name, block in blocks.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, block=block: f"{match[1]}\n{block}\n\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} has {count} places for {name}, not one")
    page.write_text(text)
    (page.parent / "plots").mkdir(exist_ok=True)
    for plot in plots.glob("*.png"):
        shutil.copy(plot, page.parent / "plots" / plot.name)
