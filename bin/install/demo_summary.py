"""What bin/demo found, out of the files that it left: size and speed of the ticket, accuracies and how finely they can be told apart."""

import json
import math
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def accuracy(name: str) -> tuple[float, int]:
    """Of a run's network, 0 to 1, and the number of test images."""
    run = json.loads((folder / name / "run.json").read_text())
    return run["results"]["accuracy"], run["data"]["test_images"]


measured = json.loads((folder / "measured.json").read_text())["measured"][0]
milliseconds, dense = (1e3 * measured[name]["median_seconds"] for name in ("latency", "dense_latency"))
print(
    f"\nthe 80 % ticket: {measured['parameters']:,} parameters "
    f"({100 * measured['parameters'] / measured['dense_parameters']:.1f} % of the dense network's), "
    f"{100 * measured['flops'] / measured['dense_flops']:.1f} % of its FLOPs, "
    f"{milliseconds:.1f} ms in place of {dense:.1f} ms for a batch ({dense / milliseconds:.2f} times as fast)"
)
for name, what in (("ticket", "the ticket, retrained"), ("dense", "the dense network, retrained alike")):
    found, images = accuracy(name)
    resolution = 196 * math.sqrt(max(found * (1 - found), 1 / images) / images)
    print(f"{what}: {100 * found:.1f} +- {resolution:.1f} % of {images} test images (95 % interval)")
print(f"the rankings of its filters over the pretraining: {folder / 'rankings.png'}")
print("One seed on easy images tells no finders apart: loft check does, over seeds (docs/results.md).")
