"""What the poster's rows would take: FLOPs of their presets, at what this machine sustained."""

from loft_hpc.analysis.size import network_size
from loft_hpc.cli.presets import NAMES, read_preset
from loft_hpc.data.registry import known_shape
from loft_hpc.jobs.prune import prunable_groups
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.scores import removed_count
from loft_hpc.runs.run import Run

from page import table
from study import DATASETS, SEEDS, Study

WORKERS = 4
PASSES = 3
"""Forward passes that a training step costs, its backward pass counting two."""
ASSUMED_GPU_FLOPS = 1e13


def _worker_flops(network: Architecture, partition: str, image_size: int) -> int:
    """FLOPs of a forward pass of one worker's sub-network, per image."""
    groups = partitioned_groups(filter_groups(network), partition)
    return network_size(network, {group.name: group.shares(WORKERS)[0] for group in groups}, image_size).flops


def _images_per_second(run: Run) -> float:
    """Of all workers together, over the whole pretraining."""
    epochs = run.events("epoch")
    images = epochs[-1]["step"] * run.configuration["batch_size"] * WORKERS
    return images / sum(event["train_wall_seconds"] for event in epochs)


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.1f}"


def poster(study: Study) -> str:
    runs = [Run.open(study.run("textures", "loft+4", seed)) for seed in SEEDS]
    rates = [_images_per_second(run) for run in runs]
    size = runs[0].required("data", dict)["image_size"]
    flops_per_image = PASSES * _worker_flops(runs[0].architecture, "paper", size)
    sustained = flops_per_image * sum(rates) / len(rates)
    rows = []
    for name in NAMES:
        if name in DATASETS:
            continue
        recipe = read_preset(name)
        pretraining, pruning, retraining = recipe["pretrain"], recipe["prune"], recipe["retrain"]
        shape = known_shape(pretraining["dataset"])
        network = architecture(pretraining["model"], shape.num_classes, shape.channels, shape.stem, pretraining["widen"])
        walked = WORKERS * pretraining["epochs"] * shape.train_images
        searching = walked * PASSES * _worker_flops(network, pretraining["partition"], shape.image_size)
        training = 0
        for ratio in pruning["ratio"]:
            pruned = prunable_groups(filter_groups(network), pruning["blocks"])
            widths = {group.name: group.width - removed_count(group.width, ratio) for group in pruned}
            training += retraining["epochs"] * shape.train_images * PASSES * network_size(network, widths, shape.image_size).flops
        flops = searching + training
        rows.append(
            [
                name,
                f"{searching:.1e}",
                f"{training:.1e}",
                _two_digits(flops / sustained / 3600),
                _two_digits(flops / ASSUMED_GPU_FLOPS / 3600),
            ]
        )
    header = [
        "preset", "FLOPs of pretraining", "of retraining its tickets", "hours at what this machine sustained",
        "GPU-hours at an assumed 10 TFLOP/s",
    ]  # fmt: skip
    note = (
        f"This machine sustained {sustained / 1e9:.0f} GFLOP/s in LoFT's epochs on textures (4 ranks on 2 cores, small layers; "
        f"{flops_per_image * min(rates) / 1e9:.0f} to {flops_per_image * max(rates) / 1e9:.0f} over {len(runs)} runs)."
    )
    return f"{note}\n\n{table(header, rows)}"
