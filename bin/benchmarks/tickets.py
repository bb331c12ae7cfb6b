"""What tickets of given pretraining runs are worth before any retraining, statistics re-estimated: do the largest filters matter?

`global` and `layer` keep the largest filters in the two scopes. `same shape` keeps as many filters in each block as `global`, and
`random` as many as `layer`, drawn at random. Means and standard deviations are over the draws. Needs no mpirun: RANKS=1 will do.
"""

import statistics
from pathlib import Path

import click

from loft_hpc.comm.start import start
from loft_hpc.data.registry import open_data
from loft_hpc.jobs.pretrain import settings_of
from loft_hpc.models.groups import Selection, filter_groups, slice_state
from loft_hpc.runs.run import Run
from loft_hpc.tickets.finders.magnitude import MagnitudeOptions, largest_filters
from loft_hpc.tickets.finders.random import draw_like
from loft_hpc.training.device import place
from loft_hpc.training.evaluation import judge, network_for


class Judge:
    """Scores selections of one run's final network."""

    def __init__(self, path: str, world):
        self._world = world
        self._device, _ = place("cpu", "float32", world)
        run = Run.open(Path(path))
        self._settings, self._architecture, self.state = settings_of(run), run.architecture, run.read_model()
        self._data, self.groups = open_data(self._settings.data, self._device, world), filter_groups(run.architecture)

    def accuracy(self, selection: Selection) -> float:
        """In per cent."""
        widths = {name: len(kept) for name, kept in selection.items()}
        part = slice_state(self.state, selection, self.groups)
        network = network_for(self._architecture, widths, part, self._device, "the ticket")
        return 100 * judge(network, self._data, self._settings.evaluation, self._world).accuracy

    def drawn(self, like: Selection, draws: int) -> str:
        """Mean and standard deviation over tickets of the same shape with filters drawn at random."""
        values = [self.accuracy(draw_like(like, self.groups, seed)) for seed in range(draws)]
        return f"{statistics.mean(values):5.1f} +- {statistics.stdev(values):4.1f}"


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.5, 0.7, 0.8), show_default=True)
@click.option("--draws", type=click.IntRange(2), default=5, show_default=True)
def main(runs: tuple[str, ...], ratios: tuple[float, ...], draws: int) -> None:
    world = start()
    for path in runs:
        of = Judge(path, world)
        for ratio in ratios:
            everywhere = largest_filters(of.state, of.groups, ratio, MagnitudeOptions(scope="global"))
            layer = largest_filters(of.state, of.groups, ratio)
            line = (
                f"{path}  ratio {ratio:g}:  global {of.accuracy(everywhere):5.1f}  same shape {of.drawn(everywhere, draws)}"
                f"  |  layer {of.accuracy(layer):5.1f}  random {of.drawn(layer, draws)}"
            )
            if world.rank == 0:
                click.echo(line)


if __name__ == "__main__":
    main()
