"""What the runs of a folder took and reached, as JSON: `table.py FOLDER`."""

import json
import sys
from pathlib import Path


def entry(run: Path) -> dict:
    """A run's results, with the seconds of its epochs."""
    description = json.loads((run / "run.json").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    return {
        "run": run.name,
        "ranks": description["world_size"],
        "engine": description.get("engine"),
        "status": description["status"],
        "results": description.get("results"),
        "placement": description["placement"],
        **{
            name: [round(epoch[name], 3) for epoch in epochs if epoch.get(name) is not None]
            for name in ("train_wall_seconds", "exchange_seconds", "images_per_second_per_rank")
        },
        "energy": [leg.get("energy") for leg in description.get("legs") or []],
    }


if __name__ == "__main__":
    print(json.dumps([entry(path.parent) for path in sorted(Path(sys.argv[1]).glob("*/run.json"))], indent=1))
