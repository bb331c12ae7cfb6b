"""What the sentences of `loft commcost RUN...` say, set against ledger.json and run.json as they lie on disk."""

import json
import re
from pathlib import Path

import pytest

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SENTENCE = re.compile(
    r"(?P<run>.+) handed over (?P<sent>[\d.]+ \w+), (?P<other>.+) (?P<others>[\d.]+ \w+): (?P<handed_over>[^;,]+); "
    r"delivered (?P<delivered>[^;,]+), on the wire (?P<wire>[^;,]+); for (?P<images>.+)\."
)
EXCHANGED = {"payload_sent_bytes": "handed_over", "payload_received_bytes": "delivered", "wire_sent_bytes": "wire"}


def exchanged(path: Path) -> dict[str, int]:
    """Bytes of the exchanges of rounds and steps, from ledger.json: without the start, merges and control."""
    found = dict.fromkeys(EXCHANGED.values(), 0)
    for operation, purposes in json.loads((path / "ledger.json").read_text())["total"].items():
        for purpose, entry in purposes.items():
            if operation != "broadcast" and purpose not in ("merge", "control"):
                for column, name in EXCHANGED.items():
                    found[name] += entry[column]
    return found


def images(path: Path) -> int:
    """Training images of all workers together, from run.json."""
    fields = json.loads((path / "run.json").read_text())
    workers = fields["world_size"] if fields["configuration"].get("strategy") == "loft" else 1
    return (fields.get("results") or {}).get("steps", fields["total_steps"]) * fields["configuration"]["batch_size"] * workers


def size(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def factor(text: str, direction: str) -> float:
    """How many times fewer: below 1 where it says more. `direction`: the first figure's, said once where all have it."""
    if text in ("as many", "about as many"):
        return 1
    number, _, own = text.partition(" times ")
    return 1 / float(number) if (own or direction) == "as many" else float(number)


def check_sentence(line: str, run: Path, reference: Path) -> re.Match:
    """The sentence's figures are those of the two ledgers, as far as its digits go."""
    said, own, other = SENTENCE.fullmatch(line), exchanged(run), exchanged(reference)
    assert said, line
    assert size(said["sent"]) == pytest.approx(own["handed_over"], rel=5.1e-3)
    assert size(said["others"]) == pytest.approx(other["handed_over"], rel=5.1e-3)
    direction = said["handed_over"].partition(" times ")[2]
    for name in EXCHANGED.values():
        assert factor(said[name], direction) == pytest.approx(other[name] / own[name], rel=0.05), (name, line)
    times = images(run) / images(reference)
    many = re.fullmatch(r"(?:([\d.]+) times )?(the|fewer|as many) ?images", said["images"].replace("about ", ""))
    assert float(many[1] or 1) == pytest.approx(1 / times if many[2] == "fewer" else times, rel=0.05), line
    return said
