"""The commands as a user types them, on one rank and on two, in one process per rank: what is printed, written and returned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from loft_hpc import load_ticket
from loft_hpc.cli.main import run
from loft_hpc.data.embedded import digits
from loft_hpc.files import read_tensors, write_tensors
from loft_hpc.models.groups import filter_groups, mask_state
from loft_hpc.models.resnet import build
from loft_hpc.runs.run import Run
from loft_hpc.tickets.ticket import Ticket

from tiny import tiny

SIZES = (2,)
SMALL = ["--model", "resnet20", "--batch-size", "128", "--statistics-batches", "2"]
QUICK = [*SMALL, "--epochs", "2"]


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory) -> Path:
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("cli")) if world.rank == 0 else None))


@pytest.fixture(scope="session")
def trained(world, folder) -> Path:
    path = folder / "run"
    assert run(["pretrain", *QUICK, "--run", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def pruned(world, trained) -> Path:
    assert run(["prune", str(trained), "--ratio", "0.8", "--ratio", "0.5"]) == 0
    return trained / "tickets"


@pytest.fixture(autouse=True)
def in_step(world):
    """Ranks begin and end every test together: one must not look at files that another still writes."""
    world.barrier()
    yield
    world.barrier()


def ask(world, capsys, *arguments) -> dict:
    """A command with --format json: rank 0's object; the other ranks print nothing."""
    capsys.readouterr()
    assert run([*map(str, arguments), "--format", "json"]) == 0
    printed = capsys.readouterr()
    if world.rank:
        assert printed.out == ""
    return MPI.COMM_WORLD.bcast(json.loads(printed.out) if world.rank == 0 else None)


def refuse(world, capsys, *arguments) -> tuple[int, str]:
    """A command that fails: its exit code and its one line, which rank 0 alone tells."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    told = [text for text in MPI.COMM_WORLD.allgather(capsys.readouterr().err) if text]
    assert len(told) == 1, told
    assert told[0].startswith("loft: ") and told[0].count("\n") == 1 and "Traceback" not in told[0], told[0]
    assert MPI.COMM_WORLD.allgather(code) == [code] * world.size
    return code, told[0]


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (("--split", "9"), 1, "--split 9 cuts after block 9, but resnet20 has 9: cut after 1 to 8"),
        (("--split", "3,5"), 1, "--split 3,5 makes 3 stages for 2 ranks: give 1 cut"),
        (("--micro-batches", "5"), 2, "--batch-size 64 cannot be cut into 5 equal micro-batches: make it a multiple of them"),
        (("--local-iterations", "4"), 2, "--local-iterations belongs to --strategy loft (see python -m loft_hpc pretrain --help)"),
        (("--compile",), 2, "--compile is for loft and data-parallel: a pipeline's stages are not compiled"),
    ],
)
def test_pipelines_that_cannot_be_leave_nothing(world, capsys, folder, options, code, line):
    path = folder / "impossible"
    told = refuse(world, capsys, "pretrain", "--strategy", "gpipe", "--model", "resnet20", "--run", path, *options)
    assert told == (code, f"loft: {line}\n") and not path.exists()


def test_a_run_has_everything(world, trained):
    description = json.loads((trained / "run.json").read_text())
    assert description["status"] == "done" and description["world_size"] == world.size
    assert description["configuration"]["model"] == "resnet20"
    assert description["partitioned_parameters"] + description["shared_parameters"] == description["parameters"]
    events = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [event["epoch"] for event in events if event["event"] == "eval"] == [1, 2]
    assert sum(event["event"] == "round" for event in events) == 3  # 22 steps, 8 a round
    assert Run.open(trained).snapshots.names() == ["epoch-000", "epoch-001", "epoch-002"]
    assert len(list((trained / "checkpoints").iterdir())) == 2
    model = read_tensors(trained / "model.safetensors")
    build(Run.open(trained).architecture).load_state_dict(model)
    assert not torch.equal(model["layer1.0.bn1.running_mean"], torch.zeros(16))


def test_pretrain_answers_in_json(world, capsys, folder):
    fields = ask(world, capsys, "pretrain", *SMALL, "--epochs", "1", "--run", folder / "json")
    assert fields["run"] == str(folder / "json") and 0 <= fields["accuracy"] <= 1 and not fields["synthetic_data"]


def test_a_resumed_run_ends_as_an_undisturbed_one(world, capsys, folder, trained):
    copy = folder / "resumed"
    if world.rank == 0:
        shutil.copytree(trained, copy)
        shutil.rmtree(copy / "checkpoints" / "000022")  # back to the end of the first epoch
        description = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps(description | {"status": "running"}))
        (copy / "model.safetensors").unlink()
    world.barrier()
    fields = ask(world, capsys, "pretrain", "--run", copy, "--resume")
    assert fields["run"] == str(copy)
    one, other = (read_tensors(path / "model.safetensors") for path in (trained, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert Run.open(trained).read_ledgers()[0].entry("allreduce", "shared") == Run.open(copy).read_ledgers()[0].entry("allreduce", "shared")


def test_resume_starts_what_is_not_there_and_refuses_other_options(world, capsys, folder, trained):
    assert ask(world, capsys, "pretrain", *SMALL, "--epochs", "1", "--run", folder / "fresh", "--resume")["run"] == str(folder / "fresh")
    code, told = refuse(world, capsys, "pretrain", "--run", trained, "--resume", "--lr", "0.3")
    assert code == 1 and "--lr 0.05" in told
    assert refuse(world, capsys, "pretrain", "--resume")[0] == 2


def test_resuming_what_is_done_changes_nothing(world, capsys, trained):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    fields = ask(world, capsys, "pretrain", "--run", trained, "--resume")
    assert fields["accuracy"] == json.loads((trained / "run.json").read_text())["results"]["accuracy"]
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


def test_tickets_on_disk_equal_the_masked_network(world, trained, pruned):
    state = read_tensors(trained / "model.safetensors")
    for name, ratio in (("magnitude-l2-0.8", 0.8), ("magnitude-l2-0.5", 0.5)):
        ticket = Ticket.read(pruned / name)
        assert ticket.provenance["ratio"] == ratio
        slim, masked = build(ticket.architecture, ticket.hidden_widths), build(ticket.architecture)
        slim.load_state_dict(ticket.state)
        masked.load_state_dict(mask_state(state, ticket.selection, filter_groups(ticket.architecture)))
        x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        # by the statistics of the batch: those that the ticket has are its own
        torch.testing.assert_close(slim.train()(x), masked.train()(x), rtol=1e-4, atol=1e-4)


def test_a_ticket_on_disk_scores_as_prune_said(world, capsys, folder, pruned):
    """Whatever the number of ranks that re-estimated its statistics; an export, made by all ranks, has the same
    accuracy."""
    scored = ask(world, capsys, "measure", pruned / "magnitude-l2-0.5", "--repetitions", "2")["measured"][0]["accuracy"]
    network = load_ticket(pruned / "magnitude-l2-0.5")
    with torch.no_grad():
        data = digits(torch.device("cpu"))
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in data.test_batches(250, 0, 1))
    assert right / data.info.test_images == pytest.approx(scored, abs=1.5 / data.info.test_images)  # sums over other ranks round otherwise
    assert run(["export", str(pruned / "magnitude-l2-0.5"), "--output", str(folder / "own.safetensors")]) == 0
    capsys.readouterr()
    world.barrier()
    assert json.loads((folder / "own.json").read_text())["accuracy"] == scored
    assert refuse(world, capsys, "export", pruned / "magnitude-l2-0.5", "--output", folder / "own.safetensors")[0] == 1


def test_retrain_and_its_rewinds(world, capsys, folder, pruned):
    for rewind in ("none", "init", "epoch:1"):
        path = folder / f"retrained-{rewind.replace(':', '')}"
        fields = ask(world, capsys, "retrain", pruned / "magnitude-l2-0.5", "--epochs", "1", "--rewind", rewind, "--run", path)
        assert fields["ticket"] == str(pruned / "magnitude-l2-0.5")
        start = Run.open(path).snapshots.read("epoch-000")
        ticket = Ticket.read(pruned / "magnitude-l2-0.5")
        source = (
            ticket.state
            if rewind == "none"
            else ticket.carve(Run.open(ticket.run_path).snapshots.read("epoch-001" if rewind == "epoch:1" else "epoch-000"))
        )
        assert all(torch.equal(start[name], source[name]) for name in start)


def test_measure(world, capsys, trained, pruned):
    fields = ask(world, capsys, "measure", trained, pruned / "magnitude-l2-0.8", "--repetitions", "3")
    dense, ticket = fields["measured"]
    assert fields["flops_per_multiply_add"] == 2
    assert dense["parameters"] == dense["dense_parameters"] == 272_186 > 3 * ticket["parameters"]
    assert ticket["flops"] < dense["flops"] and ticket["latency"]["repetitions"] == 3
    results = json.loads((trained / "run.json").read_text())["results"]
    assert dense["accuracy"] == pytest.approx(results["accuracy"])


def test_measure_distances(world, capsys, folder, trained, pruned):
    rows = ask(world, capsys, "measure", trained, "--distance-to", "final")["distances"]
    assert [row["epoch"] for row in rows] == pytest.approx([0, 16 / 11, 2])  # rounds of 8 steps, epochs of 11
    assert rows[2]["mean_normalised"] == 0 <= rows[1]["mean_normalised"] < rows[0]["mean_normalised"]
    to_init = ask(world, capsys, "measure", trained, "--distance-to", "init")["distances"]
    to_file = ask(world, capsys, "measure", trained, "--distance-to", trained / "snapshots" / "epoch-000.safetensors")["distances"]
    to_scores = ask(world, capsys, "measure", trained, "--distance-to", trained / "snapshots" / "scores-000000.safetensors")["distances"]
    assert to_init == to_file == to_scores and to_init[0]["mean_normalised"] == 0 < to_init[2]["mean_normalised"]
    assert ask(world, capsys, "measure", trained, "--distance-to", trained)["distances"] == rows
    previous = ask(world, capsys, "measure", trained, "--distance-to", "previous")["distances"]
    assert [row["step"] for row in previous] == [16, 22] and previous[0]["groups"] == to_init[1]["groups"]
    in_view = ask(world, capsys, "measure", trained, "--distance-to", "previous", "--ratio", "0.8")["distances"]
    logged = Run.open(trained).events("snapshot")
    assert [event["distance_to_previous"] for event in logged] == [row["mean_normalised"] for row in previous]
    assert [event["top_distance_to_previous"] for event in logged] == [row["mean_normalised"] for row in in_view]
    code, told = refuse(world, capsys, "measure", pruned / "magnitude-l2-0.5", "--distance-to", trained)
    assert code == 1 and "is no run" in told
    code, told = refuse(world, capsys, "measure", trained, "--distance-to", pruned / "magnitude-l2-0.5")
    assert code == 1 and "same filters" in told


def test_commcost_of_a_run_is_the_formula_to_the_byte(world, capsys, trained):
    cost = ask(world, capsys, "commcost", trained)["runs"][0]
    assert cost["ledger_bytes"] == cost["formula_bytes"] == (0 if world.size == 1 else 4 * 3 * (184_704 + 2 * 87_482))


def test_data_parallel_runs_can_be_pruned(world, capsys, folder):
    path = folder / "parallel"
    ask(world, capsys, "pretrain", "--strategy", "data-parallel", *QUICK, "--run", path)
    assert len(ask(world, capsys, "prune", path, "--ratio", "0.5", "--method", "random", "--seed", "3")["tickets"]) == 1
    cost = ask(world, capsys, "commcost", path)["runs"][0]
    assert cost["ledger_bytes"] == cost["formula_bytes"] == (0 if world.size == 1 else 4 * 22 * 2 * 272_186)


def test_pipeline_runs_can_be_pruned_and_retrained(world, capsys, folder):
    path = folder / "pipeline"
    ask(world, capsys, "pretrain", "--strategy", "gpipe", *QUICK, "--recompute", "--run", path)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [event["epoch"] for event in events if event["event"] == "eval"] == [1, 2]
    assert json.loads((path / "run.json").read_text())["cut_after_blocks"] == [[], [6]][world.size - 1]
    ticket = ask(world, capsys, "prune", path, "--ratio", "0.5")["tickets"][0]["path"]
    assert ask(world, capsys, "retrain", ticket, "--epochs", "1", "--rewind", "init", "--run", folder / "of-pipeline")["accuracy"] > 0


def test_synthetic_data_are_labelled(world, capsys, folder):
    fields = ask(
        world, capsys, "pretrain", *SMALL, "--dataset", "synthetic", "--image-size", "8", "--rounds", "1", "--run", folder / "fake"
    )
    assert fields["synthetic_data"]


def test_pretrain_refuses(world, capsys, folder, trained):
    def pretrain(*arguments):
        return refuse(world, capsys, "pretrain", *arguments)

    before = sorted(path.name for path in folder.iterdir())
    assert pretrain("--model", "resnet19")[0] == 2
    assert pretrain("--dataset", "mnist")[0] == 2
    assert pretrain("--epochs", "0")[0] == 2
    assert pretrain("--epochs", "1", "--rounds", "1")[0] == 2
    assert pretrain("--lr", "nan")[0] == 2
    assert pretrain("--local-iterations", "0")[0] == 2
    assert "loft" in pretrain("--strategy", "data-parallel", "--partition", "all-blocks")[1]
    assert "normalisation needs 2" in pretrain("--model", "resnet20", "--batch-size", "1")[1]
    assert pretrain("--widen", "inf")[0] == 2
    assert pretrain("--statistics-batch", "1")[0] == 2
    assert pretrain(*QUICK, "--run", folder / ("x" * 300))[0] == 1
    assert pretrain("--image-size", "16")[0] == 2
    assert pretrain("--batch-size", "2000", "--model", "resnet20")[0] == 2
    assert pretrain("--widen", "0.001")[0] == 2
    assert pretrain("--device", "tpu")[0] == 2
    if not torch.cuda.is_available():
        assert "no GPU" in pretrain("--device", "cuda")[1]
        assert "GPUs" in pretrain("--precision", "bfloat16")[1]
    code, told = pretrain("--dataset", "cifar10", "--data-dir", folder / "nothing")
    assert code == 1 and str(folder / "nothing") in told
    code, told = pretrain(*QUICK, "--run", trained)
    assert code == 1 and "never overwritten" in told
    code, told = pretrain(*QUICK, "--run", trained / "run.json" / "inside")
    assert code == 1 and "cannot be written" in told
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_diverged_loss_ends_the_run_and_says_so(world, capsys, folder):
    code, told = refuse(world, capsys, "pretrain", *QUICK, "--lr", "1e30", "--run", folder / "diverged")
    assert code == 1 and "lower --lr" in told
    assert json.loads((folder / "diverged" / "run.json").read_text())["status"] == "failed"


def test_prune_refuses(world, capsys, folder, trained, pruned):
    before = sorted(path.name for path in pruned.iterdir())
    for ratio in ("0", "1", "1.5", "-0.2", "nan"):
        assert refuse(world, capsys, "prune", trained, "--ratio", ratio)[0] == 2
    assert refuse(world, capsys, "prune", trained, "--ratio", "half")[0] == 2
    assert refuse(world, capsys, "prune", folder / "nothing")[0] == 1
    assert "ticket" in refuse(world, capsys, "prune", pruned / "magnitude-l2-0.5")[1]
    assert refuse(world, capsys, "prune", trained, "--ratio", "0.7", "--name", "../outside")[0] == 2
    code, told = refuse(world, capsys, "prune", trained, "--ratio", "0.7", "--ratio", "0.5")
    assert code == 1 and "never overwritten" in told
    assert sorted(path.name for path in pruned.iterdir()) == before  # not even the ticket of 0.7
    code, told = refuse(world, capsys, "prune", trained, "--ratio", "0.95", "--scope", "global", "--floor", "0.3")
    assert code == 1 and "--floor" in told


def test_broken_files_are_refused(world, capsys, folder, trained, pruned):
    copy = folder / "broken"
    if world.rank == 0:
        shutil.copytree(trained, copy)
        model = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(model[:-100])
    world.barrier()
    code, told = refuse(world, capsys, "prune", copy, "--ratio", "0.6")
    assert code == 1 and "truncated" in told
    if world.rank == 0:
        altered = bytearray(model)
        altered[-5000] ^= 1
        (copy / "model.safetensors").write_bytes(altered)
    world.barrier()
    assert "altered" in refuse(world, capsys, "measure", copy)[1]
    if world.rank == 0:
        write_tensors(copy / "model.safetensors", build(tiny(), seed=0).state_dict())
    world.barrier()
    assert "does not fit" in refuse(world, capsys, "measure", copy)[1]
    assert "no final model" in refuse(world, capsys, "prune", folder / "diverged")[1]
    if world.rank == 0:
        (copy / "run.json").write_text("{")
    world.barrier()
    assert refuse(world, capsys, "prune", copy)[0] == 1


def test_retrain_and_measure_refuse(world, capsys, folder, trained, pruned):
    ticket = pruned / "magnitude-l2-0.8"
    assert "is a run" in refuse(world, capsys, "retrain", trained)[1]
    code, told = refuse(world, capsys, "retrain", ticket, "--resume", "--run", folder / "retrained-none")
    assert code == 1 and "another ticket" in told and "magnitude-l2-0.5" in told
    assert refuse(world, capsys, "retrain", folder / "nothing")[0] == 1
    assert refuse(world, capsys, "retrain", ticket, "--rewind", "later")[0] == 2
    code, told = refuse(world, capsys, "retrain", ticket, "--rewind", "epoch:77")
    assert code == 1 and "there are epoch:0, epoch:1, epoch:2" in told
    assert refuse(world, capsys, "measure", folder)[0] == 1
    assert refuse(world, capsys, "measure")[0] == 2
    assert refuse(world, capsys, "measure", trained, "--distance-to", "epoch:9")[0] == 1
    assert refuse(world, capsys, "commcost", folder / "nothing")[0] == 1
    assert refuse(world, capsys, "dance")[0] == 2
