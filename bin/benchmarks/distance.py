"""Ranking a network's filters and the distance of two rankings, against the raw pass over the weights that any ranking needs.

`raw` is one float32 norm per filter by torch. `norms` are ours (summed in float64, so that every machine ranks alike), `distance` is
ranking both networks by norms that are there and the normalised distance of every group. Needs no mpirun: RANKS=1 will do.
"""

import statistics
import time
from collections.abc import Callable

import click
import torch

from loft_hpc.analysis.distance import score_distance
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.resnet import build
from loft_hpc.models.scores import by_group, filter_norms, filter_scores


def milliseconds(action: Callable[[], object], repetitions: int) -> float:
    action()
    taken = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), default="wideresnet34", show_default=True)
@click.option("--repetitions", type=click.IntRange(2), default=31, show_default=True)
def main(model: str, repetitions: int) -> None:
    network = architecture(model, 10)
    groups = filter_groups(network)
    states = [dict(build(network, seed=seed).to(memory_format=torch.channels_last).named_parameters()) for seed in (0, 1)]
    weights = [states[0][group.filters].detach() for group in groups]
    scores = [by_group(filter_scores(state, groups, ["l2"]), "l2") for state in states]
    raw = milliseconds(lambda: [torch.linalg.vector_norm(weight, dim=(1, 2, 3)) for weight in weights], repetitions)
    norms = milliseconds(lambda: [filter_norms(weight) for weight in weights], repetitions)
    distance = milliseconds(lambda: score_distance(*scores), repetitions)
    elements = sum(weight.numel() for weight in weights)
    click.echo(f"{model}: {sum(group.width for group in groups)} filters in {len(groups)} groups, {elements / 1e6:.1f} M weights")
    click.echo(f"raw {raw:.2f} ms   norms {norms:.2f} ms, {norms / raw:.2f}x   distance {distance:.2f} ms   medians of {repetitions}")


if __name__ == "__main__":
    main()
