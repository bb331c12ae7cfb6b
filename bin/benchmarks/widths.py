"""What `loft prune --round-to` changes of speed: a network's widths at some ratios, as they come and rounded, timed beside the dense one.

Widths decide, and not weights, so nothing is trained: weights are drawn. All networks take turns on one batch, so that whatever else the
machine does hits all alike; milliseconds are medians. Needs no mpirun: RANKS=1 will do.
"""

import click
import torch

from loft_hpc.analysis.latency import latencies
from loft_hpc.analysis.size import network_size
from loft_hpc.cli.context import table
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.resnet import build
from loft_hpc.tickets.counts import kept_of_each, rounded


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODEL_NAMES), metavar="MODEL", default="preresnet34", show_default=True)
@click.option("--image-size", type=click.IntRange(8), default=32, show_default=True)
@click.option("--channels", type=click.IntRange(1), default=3, show_default=True)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.8, 0.5, 0.3), show_default=True)
@click.option("--round-to", "multiples", multiple=True, type=click.IntRange(1), default=(1, 8, 16, 32), show_default=True)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images in a pass.")
@click.option("--repetitions", type=click.IntRange(2), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads of torch.")
def main(
    model: str,
    image_size: int,
    channels: int,
    ratios: tuple[float, ...],
    multiples: tuple[int, ...],
    batch: int,
    repetitions: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    dense = architecture(model, 10, channels)
    whole = dense.hidden_widths()
    labels, widths = ["dense"], [whole]
    for ratio in ratios:
        for multiple in multiples:
            labels.append(f"{ratio:g} removed, round-to {multiple}")
            widths.append(rounded(kept_of_each(whole, ratio, "filters"), whole, multiple))
    different = [own for place, own in enumerate(widths) if own not in widths[:place]]  # equal widths are timed once
    networks = [build(dense, own, seed=0).to(memory_format=torch.channels_last).eval() for own in different]
    timed = latencies(networks, (channels, image_size, image_size), batch, repetitions)
    sizes = [network_size(dense, own, image_size) for own in different]
    rows = []
    for label, own in zip(labels, widths, strict=True):
        place = different.index(own)
        size, seconds = sizes[place], timed[place].median_seconds
        rows.append([
            label, " ".join(str(width) for width in dict.fromkeys(own.values())), f"{size.parameters:,}", f"{100 * size.parameters / sizes[0].parameters:.1f} %",
            f"{100 * size.flops / sizes[0].flops:.1f} %", f"{1e3 * seconds:.1f}", f"{timed[0].median_seconds / seconds:.2f}x",
        ])  # fmt: skip
    click.echo(table([model, "widths", "parameters", "of dense", "FLOPs of dense", f"ms/{batch} images", "speed-up"], rows))
    click.echo(
        f"CPU, {threads} thread{'s' * (threads > 1)} of torch, images of {channels}x{image_size}x{image_size}, {repetitions} passes in turns"
    )


if __name__ == "__main__":
    main()
