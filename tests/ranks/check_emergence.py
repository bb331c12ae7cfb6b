"""Snapshots, early stops and sweeps over real ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from loft_hpc.cli.main import run
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.filterwise.emergence import LEFT, Stopping
from loft_hpc.jobs.stops import stopping_step
from loft_hpc.jobs.theory import TheorySettings, check_theorem
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.scores import filter_scores
from loft_hpc.runs.run import Run
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.settings import Computation, Optimisation

from check_cli import ask, refuse
from tiny import CPU, initial_state, make_gpipe, make_loft, tiny

SIZES = (2,)
SMALL = [
    "--model",
    "resnet20",
    "--widen",
    "0.5",
    "--batch-size",
    "64",
    "--statistics-batches",
    "2",
    "--epochs",
    "4",
    "--evaluate-every",
    "4",
]
STRATEGIES = ("loft", "data-parallel", "gpipe")


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory) -> Path:
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("emergence")) if world.rank == 0 else None))


@pytest.fixture(autouse=True)
def in_step(world):
    world.barrier()
    yield
    world.barrier()


def pretrain(path: Path, *options: str) -> Run:
    if not path.exists():
        assert run(["pretrain", *SMALL, *options, "--run", str(path)]) == 0
    return Run.open(path)


def mark_as_running(path: Path) -> None:
    """As a run's description stands when its job was killed."""
    (path / "run.json").write_text((path / "run.json").read_text().replace('"status": "done"', '"status": "running"'))


@pytest.fixture(scope="session")
def whole(world, folder) -> dict[str, Run]:
    """A run of every strategy, to its planned end."""
    runs = {}
    for strategy in STRATEGIES:
        own = {"loft": ["--local-iterations", "5"], "gpipe": ["--split", "balanced"]}.get(strategy, [])
        runs[strategy] = pretrain(folder / f"whole-{strategy}", "--strategy", strategy, *own)
        world.barrier()
    return runs


def sent_without_control(world) -> int:
    entries = [entry for purposes in world.ledger.entries.values() for purpose, entry in purposes.items() if purpose != "control"]
    return sum(entry.payload_sent_bytes for entry in entries)


def check_scores(world, training, architecture) -> None:
    """Those of the network put together, to the last bit, on every rank."""
    before = sent_without_control(world)
    found = training.filter_scores()
    assert sent_without_control(world) == before
    expected = filter_scores(training.full_state(), filter_groups(architecture))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("rule", ["paper", "all-blocks"])
@pytest.mark.parametrize(("exchange", "transport"), [("allgather", "float32"), ("alltoall", "float32"), ("alltoall", "bfloat16")])
def test_scores_of_loft_are_those_of_the_merged_network(world, pre_activation, rule, exchange, transport):
    architecture = tiny(pre_activation)
    training = make_loft(world, architecture, partition=rule, exchange=exchange, transport_dtype=transport)
    check_scores(world, training, architecture)
    for _ in range(3):
        training.advance()
    check_scores(world, training, architecture)


def test_there_are_no_scores_before_the_workers_agree(world):
    training = make_loft(world, average_every=2)
    training.advance()
    with pytest.raises(RuntimeError, match="averaged"):
        training.filter_scores()


def test_scores_of_the_baselines_too(world):
    architecture = tiny()
    training = make_gpipe(world, architecture)
    training.advance()
    check_scores(world, training, architecture)
    data = digits(CPU)
    order = Order("split", data.info.train_images, 16, 5, world.rank, world.size)
    parallel = DataParallel(architecture, None, initial_state(architecture), Optimisation(), data, order, 12, Computation(), CPU, world)
    parallel.advance(5)
    check_scores(world, parallel, architecture)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_snapshots_lie_where_the_interval_says(world, folder, strategy):
    """After exactly so many steps; after the round in which they are done, under loft."""
    own = {"loft": ["--local-iterations", "5"], "gpipe": ["--split", "balanced"]}.get(strategy, [])
    path = folder / f"by-steps-{strategy}"
    steps = pretrain(path, "--strategy", strategy, *own, "--snapshot-every", "17it")
    world.barrier()
    taken = [0, 20, 35, 55, 70, 85, 88] if strategy == "loft" else [0, 17, 34, 51, 68, 85, 88]
    assert steps.snapshots.score_steps() == taken
    assert steps.snapshots.names() == ["epoch-000", *(f"step-{step:06d}" for step in taken[1:-1]), "epoch-004"]
    assert [event["step"] for event in steps.events("snapshot")] == taken[1:]
    state = steps.snapshots.read(f"step-{taken[1]:06d}")
    expected = filter_scores(state, filter_groups(steps.architecture))
    found = steps.snapshots.read_scores(taken[1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_cheap_snapshots_hold_scores_alone(world, folder):
    cheap = pretrain(folder / "cheap", "--snapshot-every", "2ep", "--no-snapshot-tensors")
    world.barrier()
    assert cheap.snapshots.names() == ["epoch-000", "epoch-004"] and len(cheap.snapshots.score_steps()) == 3
    assert sum(file.stat().st_size for file in (cheap.path / "snapshots").glob("scores-*")) < 50_000


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_run_is_the_beginning_of_the_whole_one(world, folder, whole, strategy):
    complete = whole[strategy]
    distances = [event["top_distance_to_previous"] for event in complete.events("snapshot")]
    from_initial = [event["top_distance_to_initial"] for event in complete.events("snapshot")]
    # the first snapshot after the second that is nearer to the one before it than all earlier ones were, and has left the initial one
    number = next(
        number
        for number in range(1, len(distances))
        if distances[number] < min(distances[:number]) and from_initial[number] > min(distances[number], LEFT)
    )
    tolerance = distances[number]
    own = {"loft": ["--local-iterations", "5"], "gpipe": ["--split", "balanced"]}.get(strategy, [])
    options = ["--strategy", strategy, *own, "--stop-when-stable", "--tolerance", repr(tolerance), "--patience", "1"]
    stopped = pretrain(folder / f"stopped-{strategy}", *options)
    world.barrier()
    second = complete.snapshots.score_steps()[number + 1]
    results = stopped.description["results"]
    assert results["stopped_early"] and results["steps"] == second < complete.description["results"]["steps"] == 88
    assert stopped.description["total_steps"] == 88
    assert second == stopping_step(complete, Stopping(tolerance=tolerance, patience=1))
    assert stopping_step(complete, Stopping(tolerance=0.0, patience=4)) is None
    last, model = complete.snapshots.read(complete.snapshots.names()[number + 1]), stopped.read_model()
    assert all(torch.equal(last[name], model[name]) for name in last)
    assert stopped.snapshots.names() == complete.snapshots.names()[: number + 2]
    moved = [[event | {"stable": None} for event in one.events("snapshot")] for one in (stopped, complete)]  # what is stable, settings say
    assert moved[0] == moved[1][: number + 1]
    assert [event["epoch"] for event in stopped.events("epoch")] == list(range(1, number + 2))
    assert stopped.events("eval")[-1]["step"] == second
    # a finished run stays as it is
    before = (stopped.path / "run.json").read_text()
    world.barrier()
    assert run(["pretrain", "--run", str(stopped.path), "--resume"]) == 0
    assert (stopped.path / "run.json").read_text() == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_stops_where_it_would_have(world, folder, whole, strategy):
    """Patience of two: one snapshot before the interruption, one after it."""
    own = {"loft": ["--local-iterations", "5"], "gpipe": ["--split", "balanced"]}.get(strategy, [])
    limits = ["--stop-when-stable", "--stability", "mask-distance", "--tolerance", "1", "--patience", "2"]
    path, copy = folder / f"patient-{strategy}", folder / f"resumed-{strategy}"
    stopped = pretrain(path, "--strategy", strategy, *own, *limits)
    world.barrier()
    end = stopped.description["results"]["steps"]
    assert end == whole[strategy].snapshots.score_steps()[2] and stopped.description["results"]["stopped_early"]
    if world.rank == 0:
        shutil.copytree(path, copy)
        shutil.rmtree(copy / "checkpoints" / f"{end:06d}")
        mark_as_running(copy)
    world.barrier()
    assert run(["pretrain", "--run", str(copy), "--resume"]) == 0
    world.barrier()
    again = Run.open(copy)
    assert again.description["results"]["steps"] == end and again.description["results"]["stopped_early"]
    one, other = stopped.read_model(), again.read_model()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # ended between the checkpoint of the stop and the end: it stays stopped
    world.barrier()
    if world.rank == 0:
        (copy / "model.safetensors").unlink()
        mark_as_running(copy)
    world.barrier()
    assert run(["pretrain", "--run", str(copy), "--resume"]) == 0
    world.barrier()
    again = Run.open(copy)
    assert again.description["results"]["steps"] == end and again.description["results"]["stopped_early"]
    other = again.read_model()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [event["step"] for event in again.events("snapshot")] == [event["step"] for event in stopped.events("snapshot")]


@pytest.mark.parametrize("stopping", [True, False])
def test_a_torn_snapshot_is_no_reason_to_fail_unless_it_decides(world, capsys, folder, stopping):
    path = folder / f"torn-{stopping}"
    limits = ["--stop-when-stable", "--tolerance", "0", "--patience", "4"] if stopping else []
    pretrain(path, *limits)
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(path / "checkpoints" / "000088")
        first = path / "snapshots" / "scores-000000.safetensors"
        first.write_bytes(first.read_bytes()[:-9])
        mark_as_running(path)
    world.barrier()
    if stopping:
        code, told = refuse(world, capsys, "pretrain", "--run", path, "--resume")
        assert code == 1 and "scores-000000" in told
    else:
        assert run(["pretrain", "--run", str(path), "--resume"]) == 0


def test_foreign_and_broken_files_are_told_in_a_line(world, capsys, folder, whole):
    copy = folder / "strange"
    if world.rank == 0:
        shutil.copytree(whole["loft"].path, copy)
        for name in ("epoch-003-old", "epoch-final", "step-x", "scores-later", "notes"):
            (copy / "snapshots" / f"{name}.safetensors").write_bytes(b"")
    world.barrier()
    assert len(ask(world, capsys, "measure", copy, "--distance-to", "final")["distances"]) == 5
    assert "there are epoch:0, epoch:1" in refuse(world, capsys, "prune", copy, "--at", "epoch:7")[1]
    assert "no snapshot epoch:99" in refuse(world, capsys, "measure", copy, "--distance-to", "epoch:99")[1]
    for name in ("steps_per_epoch", "world_size", "results"):
        world.barrier()
        if world.rank == 0:
            description = json.loads((whole["loft"].path / "run.json").read_text())
            description[name] = "many"
            (copy / "run.json").write_text(json.dumps(description))
        world.barrier()
        commands = [("sweep", copy, "--epochs", "1", "--name", "other", "--ratio", "0.8", "--at", "epoch:1")]
        commands += [("measure", copy, "--distance-to", "final")] if name != "results" else []
        for command in commands:
            code, told = refuse(world, capsys, *command)
            assert code == 1 and name in told


def test_early_birds_rule_ends_a_training_too(world, folder, whole):
    limits = ["--local-iterations", "5", "--stop-when-stable", "--stability", "mask-distance", "--tolerance", "0.9", "--patience", "1"]
    stopped = pretrain(folder / "early-bird", *limits)
    world.barrier()
    assert stopped.description["results"]["steps"] == whole["loft"].snapshots.score_steps()[1]


def test_tickets_from_snapshots(world, capsys, whole):
    path = whole["loft"].path
    ticket = ask(world, capsys, "prune", path, "--at", "epoch:1", "--ratio", "0.5")["tickets"][0]["path"]
    assert ticket.endswith("magnitude-l2-0.5-epoch-1")
    early = json.loads((Path(ticket) / "ticket.json").read_text())
    assert early["drawn_from"] == "snapshots/epoch-001.safetensors"
    final = ask(world, capsys, "prune", path, "--ratio", "0.5")["tickets"][0]["path"]
    assert final.endswith("magnitude-l2-0.5")
    assert ask(world, capsys, "measure", ticket, "--repetitions", "2")["measured"][0]["accuracy"] > 0
    code, told = refuse(world, capsys, "prune", path, "--at", "epoch:9")
    assert code == 1 and "there are epoch:0, epoch:1, epoch:2, epoch:3, epoch:4" in told
    assert refuse(world, capsys, "prune", path, "--at", "later")[0] == 2


def test_a_sweep_does_nothing_twice(world, capsys, folder, whole):
    path, plot = whole["loft"].path, folder / "sweep.png"
    recipe = ["--epochs", "1", "--statistics-batches", "2"]
    first = ask(world, capsys, "sweep", path, "--ratio", "0.8", "--at", "epoch:1", *recipe)["points"]
    assert [(point["label"], point["snapshot"]) for point in first] == [(f"loft+{world.size}", "epoch:1")]
    begun = json.loads((Path(first[0]["retrained"]) / "run.json").read_text())["started"]
    points = ask(
        world, capsys, "sweep", path, whole["data-parallel"].path, "--ratio", "0.8", "--ratio", "0.5", *recipe, "--plot", plot
    )["points"]  # fmt: skip
    assert len(points) == 2 * 2 * 5 and first[0] in points
    assert json.loads((Path(first[0]["retrained"]) / "run.json").read_text())["started"] == begun
    assert plot.stat().st_size > 10_000
    ended = {point["retrained"]: (Path(point["retrained"]) / "run.json").read_text() for point in points}
    world.barrier()
    assert ask(world, capsys, "sweep", path, whole["data-parallel"].path, "--ratio", "0.8", "--ratio", "0.5", *recipe)["points"] == points
    assert all((Path(name) / "run.json").read_text() == text for name, text in ended.items())
    # what a point says is what its run says, and the ticket is its snapshot's
    one = points[0]
    description = json.loads((Path(one["retrained"]) / "run.json").read_text())
    assert (
        description["results"]["accuracy"] == one["accuracy"] and description["ticket"]["drawn_from"] == "snapshots/epoch-000.safetensors"
    )
    # the ledger of a point is its own, not that of all before it
    last = Run.open(Path(points[-1]["retrained"])).read_ledgers()[0].entry("allreduce", "gradient").calls
    assert last == (0 if world.size == 1 else description["total_steps"])


def test_an_interrupted_sweep_goes_on(world, capsys, folder, whole):
    path = whole["loft"].path
    point = path / "sweeps" / "default" / "magnitude-l2-0.8-epoch-2"
    expected = json.loads((point / "run.json").read_text())["results"]["accuracy"]
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(point)
        shutil.rmtree(path / "tickets" / "magnitude-l2-0.8-epoch-2")
    world.barrier()
    recipe = ["--epochs", "1", "--statistics-batches", "2", "--ratio", "0.8", "--at", "epoch:2"]
    assert ask(world, capsys, "sweep", path, *recipe)["points"][0]["accuracy"] == expected


def test_runs_that_are_not_alike_are_not_averaged(world, capsys, folder, whole):
    """Other seeds are one curve; another recipe is a curve of its own."""
    options = ["--local-iterations", "5", "--epochs", "1", "--evaluate-every", "1"]
    other_seed, other_rate = folder / "other-seed", folder / "other-rate"
    for path, own in ((other_seed, ["--seed", "1"]), (other_rate, ["--lr", "0.01"]), (folder / "same", [])):
        pretrain(path, *options, *own)
        world.barrier()
    recipe = ["--epochs", "1", "--statistics-batches", "2", "--ratio", "0.8", "--at", "init", "--at", "epoch:0"]
    alike = ask(world, capsys, "sweep", folder / "same", other_seed, *recipe)["points"]
    assert [point["label"] for point in alike] == [f"loft+{world.size}"] * 2  # init and epoch:0 are one snapshot
    mixed = ask(world, capsys, "sweep", folder / "same", other_rate, *recipe)["points"]
    assert [point["label"] for point in mixed] == [f"loft+{world.size} same", f"loft+{world.size} other-rate"]
    # the blocks of a preset's [prune] are those of its sweep
    preset = ["--preset", "cifar10-resnet34", "--name", "poster", "--epochs", "1", "--batch-size", "128", "--ratio", "0.5", "--at", "init"]
    (point,) = ask(world, capsys, "sweep", folder / "same", *preset)["points"]
    assert point["retrained"].endswith("magnitude-l2-release-0.5-epoch-0")


def test_sweep_refuses(world, capsys, folder, whole):
    path = whole["loft"].path
    code, told = refuse(world, capsys, "sweep", path, "--epochs", "2", "--statistics-batches", "2")
    assert code == 1 and "--epochs 1" in told and "--name" in told
    assert refuse(world, capsys, "sweep", path, "--at", "every", "--at", "init")[0] == 2
    assert refuse(world, capsys, "sweep", path, path)[0] == 2
    assert refuse(world, capsys, "sweep", path, path / ".." / path.name)[0] == 2
    assert refuse(world, capsys, "sweep", path, "--at", "epoch:11")[0] == 1
    assert refuse(world, capsys, "sweep", path, "--name", "../x")[0] == 2
    assert refuse(world, capsys, "sweep", path, "--plot", "x.jpg")[0] == 2
    assert refuse(world, capsys, "sweep", folder)[0] == 1
    retrained = path / "sweeps" / "default" / "magnitude-l2-0.8-epoch-2"
    code, told = refuse(world, capsys, "sweep", retrained)
    assert code == 1 and "pretraining run" in told


def test_pretrain_refuses_stops_that_make_no_sense(world, capsys):
    def told(*options):
        code, text = refuse(world, capsys, "pretrain", *options)
        assert code == 2
        return text

    assert "--stop-when-stable" in told("--tolerance", "0.1")
    assert "--stop-when-stable" in told("--patience", "2")
    assert "--snapshot-every" in told("--stop-when-stable", "--snapshot-every", "0")
    assert "--snapshot-every" in told("--snapshot-every", "often")
    assert "--tolerance" in told("--stop-when-stable", "--tolerance", "2")
    assert "--patience" in told("--stop-when-stable", "--patience", "0")
    assert "--stable-ratio" in told("--stable-ratio", "1")


def test_distances_are_drawn(world, capsys, folder, whole):
    one, several = folder / "one.png", folder / "plots" / "several.png"
    ask(world, capsys, "measure", whole["loft"].path, "--distance-to", "final", "--plot", one)
    ask(world, capsys, "measure", *(whole[name].path for name in STRATEGIES), "--distance-to", "previous", "--plot", several)
    world.barrier()
    assert one.stat().st_size > 10_000 and several.stat().st_size > one.stat().st_size
    assert refuse(world, capsys, "measure", whole["loft"].path, "--distance-to", "final", "--plot", folder / "x.txt")[0] == 2
    for option in (("--plot", one), ("--ratio", "0.8"), ("--norm", "l1")):
        assert "--distance-to" in refuse(world, capsys, "measure", whole["loft"].path, *option)[1]
    assert refuse(world, capsys, "measure", whole["loft"].path, "--distance-to", "final", "--latency-batch", "3")[0] == 2
    code, text = refuse(world, capsys, "measure", whole["loft"].path, "--distance-to", folder / "one.png")
    assert code == 1 and "neither a run nor a ticket" in text


def test_the_theorems_figures_do_not_depend_on_the_ranks(world, capsys, folder):
    settings = TheorySettings(filters=(8, 16, 32), workers=(1, 2), images=6, steps=10, starts=2, deals=2)
    together = check_theorem(settings, world)

    class Alone:
        rank, size = 0, 1

        def gather_objects(self, value):
            return [value]

    alone = check_theorem(settings, Alone())
    assert together == alone and len(alone.cells) == 3 * 2 * 2
    small = ["--filters", "8", "--filters", "16", "--workers", "2", "--images", "6", "--steps", "10", "--starts", "2", "--deals", "2"]
    fields = ask(world, capsys, "theory", *small, "--plot", folder / "theory.png")
    assert len(fields["cells"]) == 2 and fields["remarks"] and fields["cells"][0]["total"] > 0
    assert refuse(world, capsys, "theory", "--filters", "4", "--workers", "8")[0] == 2
    assert refuse(world, capsys, "theory", "--filters", "9", "--workers", "2")[0] == 2
    assert refuse(world, capsys, "theory", "--filters", "8", "--filters", "8")[0] == 2
    assert refuse(world, capsys, "theory", "--eta", "nan")[0] == 2
    code, told = refuse(world, capsys, "theory", *small, "--eta", "1e6", "--steps", "100")
    assert code == 1 and "--eta" in told
    assert refuse(world, capsys, "theory", "--patch-size", "3")[0] == 2
    assert refuse(world, capsys, "theory", "--eta", "-1")[0] == 2
    assert refuse(world, capsys, "theory", "--plot", "x.jpg")[0] == 2
