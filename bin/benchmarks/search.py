"""What Gem-Miner's search finds: accuracy of its ticket, of its mask shuffled within each layer, and of random weights of smart ratios.

Each before and after finetuning with the same weights and budget, for several seeds (of initialisation, scores, data order and draws). One
process: RANKS=1 bin/bench search.
"""

import time

import click
import torch

from loft_hpc.comm.start import start
from loft_hpc.data.embedded import digits, textures
from loft_hpc.data.order import Order
from loft_hpc.jobs.check import random_like
from loft_hpc.models.architecture import architecture
from loft_hpc.models.resnet import build
from loft_hpc.tickets.finders.gem_miner import paper_regulariser, search_rate
from loft_hpc.tickets.masks import WeightMask, weight_shapes
from loft_hpc.tickets.score_search import ScoreSearch, SearchRule, freezings, searched_tensors, signed_constants
from loft_hpc.tickets.source import Workshop
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.evaluation import judge, network_for
from loft_hpc.training.settings import Computation, Evaluation, Optimisation

CPU = torch.device("cpu")


@click.command(help=__doc__)
@click.option("--dataset", type=click.Choice(["digits", "textures"]), default="digits", show_default=True)
@click.option("--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.0144, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Of the search.")
@click.option("--finetuning", type=click.IntRange(1), default=2, show_default=True, help="Epochs of finetuning.")
@click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
def main(dataset: str, density: float, epochs: int, finetuning: int, batch_size: int, seeds: int) -> None:
    world = start()
    data = digits(CPU) if dataset == "digits" else textures(CPU, 12)
    network = architecture("resnet20", data.info.num_classes, data.info.channels, data.info.stem)
    total = sum(shape.numel() for shape in weight_shapes(network).values())
    keep = round(total * density)
    for seed in range(seeds):
        order = Order("split", data.info.train_images, batch_size, seed, 0, 1)
        steps = epochs * order.steps_per_epoch
        rate = search_rate(steps)
        shop = Workshop(network, data, order, steps, Optimisation(lr=rate, weight_decay=0), None, seed, Computation(), CPU, world)
        weights = signed_constants({name: tensor.detach() for name, tensor in build(network, seed=100 + seed).named_parameters()})
        plan = freezings(epochs, max(1, round((epochs - 1) / 29)), order.steps_per_epoch, total, keep)
        began = time.perf_counter()
        search = ScoreSearch(shop, weights, SearchRule(keep, paper_regulariser(density), plan))
        while search.advance().step < steps:
            pass
        seconds = time.perf_counter() - began
        alive = searched_tensors(network, search.checkpoint()[0]["alive"])
        mask = WeightMask(network, {name: (values > 0).to(torch.uint8) for name, values in alive.items()})
        for name, own in (("gem-miner", mask), ("shuffled", mask.shuffled(seed)), ("random", random_like(mask, seed))):
            state = own.carve(weights)
            before = judge(network_for(network, None, state, CPU, ""), data, Evaluation(), world).accuracy
            training = DataParallel(
                network,
                None,
                state,
                Optimisation(lr=0.1),
                data,
                order,
                finetuning * order.steps_per_epoch,
                Computation(),
                CPU,
                world,
                own.weights,
            )
            while training.advance().step < training.total_steps:
                pass
            after = judge(network_for(network, None, training.full_state(), CPU, ""), data, Evaluation(), world).accuracy
            click.echo(
                f"{dataset} seed {seed}  {keep} of {total} weights  {name:10} before finetuning {100 * before:5.1f} %  after {100 * after:5.1f} %"
                + (f"  searched {steps} steps at rate {rate:.2f} in {seconds:.0f} s" if name == "gem-miner" else "")
            )


if __name__ == "__main__":
    main()
