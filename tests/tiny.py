"""Small networks and trainings that the tests share."""

from dataclasses import replace

import torch

from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.filterwise.loft import Loft, LoftSettings
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.resnet import build
from loft_hpc.pipeline.gpipe import GPipe, PipelineSettings
from loft_hpc.training.settings import Computation, Optimisation

CPU = torch.device("cpu")


def tiny(pre_activation: bool = False, num_classes: int = 10) -> Architecture:
    """Three stages of 1, 2 and 2 blocks with 8, 12 and 16 channels: two groups under the paper's rule, of 12 and 16 filters."""
    return Architecture("tiny", (1, 2, 2), (8, 12, 16), pre_activation, 1, "cifar", 1, num_classes)


def initial_state(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in build(architecture, seed=seed).named_parameters()}


def make_loft(
    world, architecture=None, lr=0.1, rounds=4, batch_size=16, seed=5, sharing="replicated", weight_decay=5e-4,
    computation=None, **settings,
) -> Loft:  # fmt: skip
    """LoFT on digits: `rounds` rounds of 3 local steps, unless `settings` say otherwise."""
    architecture = architecture or tiny()
    settings = replace(LoftSettings(local_iterations=3), **settings)
    optimisation = Optimisation(lr=lr, weight_decay=weight_decay, schedule="cosine")
    data = digits(CPU)
    order = Order(sharing, data.info.train_images, batch_size, seed, world.rank, world.size)
    total = rounds * settings.local_iterations
    return Loft(
        architecture,
        initial_state(architecture),
        settings,
        optimisation,
        data,
        order,
        total,
        seed,
        computation or Computation(),
        CPU,
        world,
    )


def make_gpipe(world, architecture=None, steps=12, batch_size=16, seed=5, lr=0.1, **settings) -> GPipe:
    """A pipeline on digits, all ranks being one worker; cuts evenly over the blocks unless `settings` say otherwise."""
    architecture = architecture or tiny()
    settings = replace(PipelineSettings(split="balanced"), **settings)
    data = digits(CPU)
    order = Order("replicated", data.info.train_images, batch_size, seed, 0, 1)
    return GPipe(
        architecture, initial_state(architecture), settings, Optimisation(lr=lr), data, order, steps, Computation(), CPU, world
    )  # fmt: skip
