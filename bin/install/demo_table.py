"""The table at the end of bin/demo: accuracies out of the run.json files that the demo left."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def accuracy(run: Path) -> float:
    return 100 * json.loads((run / "run.json").read_text())["results"]["accuracy"]


images = json.loads((folder / "pretrain/run.json").read_text())["data"]["test_images"]
print(f"\nTest accuracy on digits ({images} test images: one image is {100 / images:.2f} points)\n")
print(f"{'':24}  {'LoFT ticket':>11}  {'random ticket':>13}")
print(f"{'dense, merged network':24}  {accuracy(folder / 'pretrain'):9.2f} %")
for ratio in ("0.8", "0.5", "0.3"):
    found, random = (accuracy(folder / "retrain" / f"{kind}-{ratio}") for kind in ("magnitude-l2", "random-seed0"))
    print(f"{f'{100 * float(ratio):.0f} % pruned, retrained':24}  {found:9.2f} %  {random:11.2f} %")
print("\nDigits are easy: after retraining, tickets differ by less than such a table can resolve (docs/results.md).")
