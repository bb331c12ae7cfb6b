"""What tickets of given pretraining runs are worth before any retraining, statistics re-estimated: do the largest filters matter?

`global` and `layer` keep the largest filters in the two scopes; `same shape` keeps as many filters in each block as `global`, drawn at
random; `random` and `smallest` keep as many in each block as `layer`. Means and standard deviations are over the draws.
"""

import statistics
from pathlib import Path

import click
import numpy as np
import torch

from loft_hpc.comm.world import start
from loft_hpc.data.registry import open_data
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.models.groups import Selection, filter_groups, slice_state
from loft_hpc.runs.run import Run
from loft_hpc.tickets.finders import Pruning, magnitude
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import judge, network_for


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.5, 0.7, 0.8), show_default=True)
@click.option("--draws", default=5, show_default=True)
def main(runs: tuple[str, ...], ratios: tuple[float, ...], draws: int) -> None:
    world = start()
    device, _ = place("cpu", "float32", world)
    for path in runs:
        run = Run.open(Path(path))
        settings, architecture, state = settings_of(run), run.architecture, run.read_model()
        data, groups = open_data(settings.data, device, world), filter_groups(architecture)

        def accuracy(selection: Selection) -> float:
            widths = {name: len(kept) for name, kept in selection.items()}
            network = network_for(architecture, widths, slice_state(state, selection, groups), device, path)
            return 100 * judge(network, data, settings.evaluation, world).accuracy

        def drawn(like: Selection) -> str:
            values = []
            for seed in range(draws):
                draw = np.random.RandomState(seed)
                kept = {group.name: np.sort(draw.permutation(group.width)[: len(like[group.name])]) for group in groups}
                values.append(accuracy({name: torch.from_numpy(indices) for name, indices in kept.items()}))
            return f"{statistics.mean(values):5.1f} +- {statistics.stdev(values):4.1f}"

        for ratio in ratios:
            everywhere, layer = magnitude(state, groups, Pruning(ratio, scope="global")), magnitude(state, groups, Pruning(ratio))
            inverted = dict(state)
            for group in groups:  # a filter over the square of its norm has the inverse norm
                norms = state[group.filters].flatten(1).norm(dim=1)
                inverted[group.filters] = state[group.filters] / norms.square().view(-1, 1, 1, 1)
            smallest = accuracy(magnitude(inverted, groups, Pruning(ratio)))
            line = (
                f"{path}  ratio {ratio:g}:  global {accuracy(everywhere):5.1f}  same shape {drawn(everywhere)}"
                f"  |  layer {accuracy(layer):5.1f}  random {drawn(layer)}  smallest {smallest:5.1f}"
            )
            if world.rank == 0:
                click.echo(line)


main()
