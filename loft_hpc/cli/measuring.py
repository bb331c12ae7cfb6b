"""Options of what is measured of a network, which `loft measure` and `loft compare` share."""

from typing import Any

import click

from loft_hpc.analysis.energy import codecarbon_intensity
from loft_hpc.cli.options import Decorator, fill, option, several
from loft_hpc.jobs.measure import MeasureSettings

NO_TRAINING_MEMORY = "no memory in training: BatchNorm needs two images, give a larger --latency-batch"


def measure_options(energy: bool, robustness: bool) -> Decorator:
    """With the command's own defaults of what takes long."""
    return several(
        option(MeasureSettings, "latency_batch", "Images in a timed forward pass.", type=int),
        option(MeasureSettings, "repetitions", "Timed forward passes of each network.", type=int),
        click.option(
            "--energy/--no-energy", default=energy, show_default=True,
            help="Joules of forward passes: counters of GPUs (NVML) and processors (RAPL) where readable, else an estimate, labelled so.",
        ),
        option(MeasureSettings, "carbon_intensity", "Grams of CO2 for a kilowatt-hour.", type=float),
        click.option("--country", metavar="ABC", help="Take the carbon intensity of this country from codecarbon's tables, if it is installed."),
        click.option(
            "--robustness/--no-robustness", default=robustness, show_default=True,
            help="Accuracy under FGSM, PGD and the common corruptions that need no download.",
        ),
        option(MeasureSettings, "epsilon", "Strength of FGSM and PGD, as a share of the range of a pixel.", type=float),
        option(MeasureSettings, "pgd_steps", "Steps of PGD.", type=int),
        click.option(
            "--severity", "severities", multiple=True, type=int, default=(1, 2, 3, 4, 5), show_default=True,
            help="Severities of the corruptions (repeat for more).",
        ),
        click.option("--cifar-c", type=click.Path(), help="Folder of CIFAR-10-C or CIFAR-100-C: accuracy on it."),
        click.option("--cifar10-1", "cifar10_1", type=click.Path(), help="Folder of CIFAR-10.1: accuracy on it."),
        click.option("--cifar10-2", "cifar10_2", type=click.Path(), help="Folder of CIFAR-10.2: accuracy on it."),
    )  # fmt: skip


def measure_settings(options: dict[str, Any]) -> MeasureSettings:
    """Out of these options. Raises LoftError for values that mean nothing."""
    intensity = options["carbon_intensity"] if options["country"] is None else codecarbon_intensity(options["country"])
    return fill(MeasureSettings, options | {"carbon_intensity": intensity})
