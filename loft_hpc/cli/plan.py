"""`loft plan`."""

import os
from pathlib import Path

import click

from loft_hpc.analysis.timing import Cluster
from loft_hpc.cli import pretrain, prune, retrain
from loft_hpc.cli.context import Job, format_option
from loft_hpc.cli.dryrun import (
    BYTES_NOTE,
    MAX_WORKERS,
    cost_text,
    describing_options,
    memory_text,
    outlook_fields,
    outlook_table,
    shape_text,
    warning_line,
    worker_hours,
    workers_text,
)
from loft_hpc.cli.options import cluster_option
from loft_hpc.cli.pruning import prunings_of
from loft_hpc.errors import LoftError
from loft_hpc.jobs.dryrun import Choice, choose, data_shape, retraining, runs_on_gpu
from loft_hpc.jobs.jobscript import JobScript, read_script
from loft_hpc.jobs.memory import rank_memories
from loft_hpc.jobs.plan import Stage, pruning_stage, retraining_of, summed
from loft_hpc.jobs.prediction import Case, Outlook
from loft_hpc.jobs.retrain import ticket_data
from loft_hpc.tickets.ticket import Ticket


class _Stages:
    """The commands of a job script, one after the other: each is parsed by its own options, as when it is run."""

    def __init__(self, workers: int, cluster: Cluster | None, classes: int | None, images: int | None):
        self._workers, self._cluster, self._described = workers, cluster, (classes, images)
        self.stages: list[Stage] = []
        self.choices: dict[str, Choice] = {}
        """The trainings, by the names of their stages."""
        self.notes: list[str] = []
        self.memory: tuple[int, str] | None = None
        """The most that a rank holds, and in which stage."""
        self._case: Case | None = None
        self._drawn: tuple = ()

    def add(self, name: str, arguments: list[str]) -> None:
        known = {
            "pretrain": (pretrain, self._pretrain),
            "prune": (prune, self._prune),
            "retrain": (retrain, self._retrain),
        }
        if name in known:
            module, stage = known[name]
            stage(module.command.make_context(f"loft {name}", arguments))

    def _pretrain(self, context: click.Context) -> None:
        settings = pretrain.settings_of_options(context)
        shape, known_from = data_shape(settings.data, *self._described)
        self._case = Case.of(settings, shape)
        self.notes.append(f"Data: {settings.data.label}, {shape_text(shape, known_from)}.")
        self._training(f"pretrain {settings.model} with {settings.strategy}", self._case)

    def _prune(self, context: click.Context) -> None:
        prunings = prunings_of(context.params["ratios"], context.params)
        self._drawn = (prunings, context.params["blocks"])
        self.stages.append(pruning_stage(self._pretrained, *self._drawn, self._workers, self._cluster))
        dense = self._pretrained.network
        if any(pruning.finder.shallower(pruning.ratio, dense) != dense for pruning in prunings):
            self.notes.append("Tickets: as if all blocks had the same score; which ones go, their scores will decide.")
        elif getattr(prunings[0].options, "scope", "layer") == "global":
            self.notes.append("Tickets: as if every block kept the same share, which one ranking over all will decide.")

    def _retrain(self, context: click.Context) -> None:
        ticket = Path(context.params["ticket"])
        if (ticket / "ticket.json").is_file():
            source = Ticket.read(ticket)
            settings = retrain.retraining_settings(context, ticket_data(source))
            shape, _ = data_shape(settings.data, *self._described)
            self._training(f"retrain {ticket.name}", retraining(source, settings, shape))
            return
        if not self._drawn:
            raise LoftError(f"{ticket} is not there yet, and the script does not draw it: plan the script that does")
        prunings, blocks = self._drawn
        settings = retrain.retraining_settings(context, self._pretrained.settings.data)
        for pruning in prunings:
            name = f"retrain {pruning.method}, ratio {pruning.ratio:g}"
            self._training(name, retraining_of(self._pretrained, pruning, blocks, settings))

    def _training(self, name: str, case: Case) -> None:
        self.choices[name] = choose(case, self._workers, self._cluster)
        most = max(memory.total for memory in rank_memories(case, self._workers, runs_on_gpu(case.settings.computation, self._cluster)))
        self.memory = max(self.memory or (0, ""), (most, name), key=lambda one: one[0])
        self.stages.append(Stage(name, self.choices[name].asked))

    @property
    def _pretrained(self) -> Case:
        if self._case is None:
            raise LoftError("the script pretrains nothing before it prunes: plan the script that does")
        return self._case


@click.command("plan")
@click.argument("script", type=click.Path())
@click.option(
    "--workers", type=click.IntRange(1, MAX_WORKERS), help="Number of ranks.  [default: as the #SBATCH lines say]"
)  # fmt: skip
@cluster_option("predicts hours too.")
@describing_options
@format_option
@click.pass_context
def command(
    context: click.Context, script: str, workers: int | None, cluster_name: str | None, classes: int | None,
    images: int | None, format: str,
) -> None:  # fmt: skip
    """What a job script like slurm/imagenet.sh would take: pretraining, pruning and each retraining, in one table.

    bash reads the script with LOFT_PLAN set, in which slurm/common.sh tells the loft commands in place of running
    them: nothing is trained or written, programs are not run, and variables such as LOFT_DATA, LOFT_PRESET and
    LOFT_OPTIONS count as for sbatch.

    Example: loft plan slurm/imagenet.sh --cluster nvlink-hdr
    """
    job: Job = context.obj
    job.join()
    cluster = Cluster.read(cluster_name) if cluster_name else None
    made = read_script(Path(script), dict(os.environ), Path.cwd())
    if not made.commands:
        raise LoftError(f"{script} trains nothing, so there is nothing to plan: give a script like slurm/imagenet.sh")
    if cluster:
        cluster = cluster.placed(made.ranks_per_node)
    workers = workers or made.workers
    stages = _Stages(workers, cluster, classes, images)
    for name, *arguments in made.commands:
        stages.add(name, arguments)
    _show(job, format, made, stages, workers, cluster)


def _gpu_warning(script: JobScript, workers: int) -> list[str]:
    """What slurm/common.sh will say of GPUs without a rank, and of those that ranks share."""
    if script.gpus > workers:
        gpus = f"WARNING: more GPUs ({script.gpus}) than ranks ({workers}), so that some would idle"
        return [f"{gpus}: give --ntasks-per-node what --gpus-per-node has."]
    if 0 < script.gpus < workers:
        gpus = f"WARNING: more ranks ({workers}) than GPUs ({script.gpus}): they share, which takes longer than this"
        return [f"{gpus}; ask for a GPU for each."]
    return []


def _retraining_share(stages: _Stages, total: Outlook) -> list[str]:
    """What the retrainings take of the whole, where that is the greater part."""
    own = [stage.outlook for stage in stages.stages if stage.name.startswith("retrain")]
    part, whole = sum(one.images for one in own), total.images
    kind = "images"
    if total.seconds is not None:
        part, whole, kind = sum(one.seconds for one in own), total.seconds, "time"
    if not own or part <= whole / 2:
        return []
    return [
        f'Retraining takes {100 * part / whole:.0f} % of the {kind}: fewer tickets, or LOFT_RETRAIN_OPTIONS="--epochs N" (slurm/common.sh), '
        "take less."
    ]


def _beside(stages: _Stages, on_gpu: bool) -> list[str]:
    """What else a pretraining could be on as many workers."""
    lines = []
    for name, choice in stages.choices.items():
        if name.startswith("pretrain") and choice.beside:
            rows = [("as asked", choice.asked), *((f"with {one.options}", one) for one in choice.beside)]
            lines += [
                outlook_table(rows, name, on_gpu),
                *(f"-: {one.options}: {one.impossible}" for one in choice.beside if one.impossible),
                "",
            ]
    return lines


def _show(
    job: Job, format: str, script: JobScript, stages: _Stages, workers: int, cluster: Cluster | None
) -> None:  # fmt: skip
    total = summed(stages.stages)
    trained = [choice.case.settings.computation for choice in stages.choices.values()]
    on_gpu = any(runs_on_gpu(computation, cluster) for computation in trained)
    if not (cluster and cluster.device):
        on_gpu = on_gpu or bool(script.gpus)
    lines = [warning_line(choice, on_gpu, f"{name}: ") for name, choice in stages.choices.items()]
    warnings = [line for line in lines if line] + _gpu_warning(script, workers)
    notes = [
        *dict.fromkeys(stages.notes),
        BYTES_NOTE,
        f"Memory: at most {memory_text(stages.memory[0])} a rank, in {stages.memory[1]} (parts: its --dry-run).",
        f"{worker_hours(on_gpu)}: of all workers, which the job holds to its end.",
    ]
    if cluster:
        model = f"alpha-beta model of {cluster.name} ({cluster.described})"
        notes.append(f"Times: {model}, without evaluations but for pruning.")
    else:
        notes.append("Times: --cluster FILE tells them.")
    rows = [(stage.name, stage.outlook) for stage in stages.stages]
    fields = {
        "script": str(script.path),
        "workers": workers,
        "nodes": script.nodes,
        "ranks_per_node": script.ranks_per_node,
        "gpus": script.gpus,
        "cluster": cluster and cluster.name,
        "stages": [{"stage": name, **outlook_fields(one)} for name, one in rows],
        "sum": outlook_fields(total),
        "beside": {name: [outlook_fields(one) for one in choice.beside] for name, choice in stages.choices.items()},
        "memory_bytes": stages.memory[0],
        "warnings": warnings,
        "notes": notes,
    }
    nodes = f" on {script.nodes} node{'s' * (script.nodes > 1)}" if script.nodes else ""
    predicted = f"{cost_text(total, on_gpu)}, predicted for {cluster.name}" if cluster else ""
    images = f"{total.images:,} images of all workers together"
    lines = [
        f"{script.path} with {workers_text(workers)}{nodes}: {predicted or images}",
        *warnings,
        "",
        outlook_table([*rows, ("sum", total)], "stage", on_gpu),
        *_retraining_share(stages, total),
        "",
        *_beside(stages, on_gpu),
        *notes,
        f"next: sbatch {script.path}",
    ]
    job.show(format, fields, "\n".join(lines))
