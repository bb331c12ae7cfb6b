"""What a training on disk took: walks through the data, images, arithmetic, bytes and time."""

from dataclasses import dataclass

from loft_hpc.analysis.size import network_size
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.runs.run import Run
from loft_hpc.tickets.ticket import Cost

MOST_PIXELS = 4096
PASSES = 3
"""A backward pass takes about twice what its forward pass does."""


@dataclass(frozen=True)
class Seen:
    """What a run's training went through."""

    step: int
    """Steps of a worker."""
    images: int
    """Training images of all workers together, those of every repetition counted."""
    train_images: int
    """Training images that the data set has."""
    image_size: int
    """Height and width of an image in pixels."""


def seen_by(run: Run, step: int | None = None) -> Seen:
    """Until after `step` (None: to the end), from what run.json says. Raises LoftError where it does not."""
    total, workers = run.required("total_steps", int), run.required("world_size", int)
    data = run.required("data", dict)
    try:
        done = int((run.description.get("results") or {}).get("steps", total))
        images, batch, size = int(data["train_images"]), int(run.configuration["batch_size"]), int(data["image_size"])
        if not (0 <= done <= total and 1 <= images < 2**40 and 1 <= batch < 2**31 and 1 <= size <= MOST_PIXELS):
            raise ValueError("out of bounds")
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise LoftError(f"{run.path / 'run.json'} does not say what it trained on ({problem}): restore it or make the run anew") from None
    step = min(done if step is None else step, total)
    batches = workers if run.configuration.get("strategy") == "loft" else 1  # a step of LoFT is one batch of every worker
    return Seen(step, step * batch * batches, images, size)


def cost_of(run: Run, step: int | None = None) -> Cost:
    """Until after `step` (None: to its end), from what the run says about itself; of all ranks together.

    Bytes and seconds are those of the run's log, the part of an epoch or of the time between two checkpoints taken in proportion to its
    steps; seconds without evaluations and start-up. Under LoFT a worker's network holds a share of the partitioned filters, and its FLOPs are counted so.
    """
    seen = seen_by(run, step)
    loft = run.configuration.get("strategy") == "loft"
    widths = _worker_widths(run, run.required("world_size", int)) if loft else run.hidden_widths
    flops = PASSES * network_size(run.architecture, widths, seen.image_size).flops * seen.images
    sent = _until(run.events("ledger"), "payload_sent_bytes", seen.step, cumulative=True)
    seconds = _until(run.events("epoch"), "train_wall_seconds", seen.step, cumulative=False)
    return Cost(seen.images / seen.train_images, seen.images, float(flops), round(sent), seconds)


def _worker_widths(run: Run, workers: int) -> dict[str, int]:
    architecture = run.architecture
    loft = run.configuration.get("loft")
    rule = loft.get("partition", "paper") if isinstance(loft, dict) else "paper"
    widths = architecture.hidden_widths()
    dealt = {group.name for group in partitioned_groups(filter_groups(architecture), rule)}
    return {name: max(1, width // workers) if name in dealt else width for name, width in widths.items()}


def _until(events: list[dict], name: str, step: int, cumulative: bool) -> float:
    """The sum of a log's figure until a step. Events that say none are passed over: a broken log costs an estimate, not the ticket."""
    before, value = 0, 0.0
    for event in events:
        at, figure = event.get("step"), event.get(name)
        if type(at) is not int or type(figure) not in (int, float) or at <= before or not 0 <= figure < 1e30:
            continue
        added = figure - value if cumulative else figure
        if at >= step:
            return value + added * (step - before) / (at - before)
        before, value = at, value + added
    return value
