"""The job scripts under a real Slurm of one node: to the end, preempted, cancelled, out of time, and typed wrongly."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loft_hpc.files import read_json, read_tensors

from slurm_cluster import CPUS, Cluster, available
from slurm_job import ENDED, SlurmJob

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent
RANKS = 2
SMALL = {
    "LOFT_OPTIONS": "--widen 1 --epochs 6 --evaluate-every 6 --statistics-batches 2",
    "LOFT_PRUNE_OPTIONS": "--ratio 0.8",
    "LOFT_RETRAIN_OPTIONS": "--epochs 12 --evaluate-every 12 --statistics-batches 2",
}
TICKET = "magnitude-l2-0.8"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = available()
    if reason:
        pytest.skip(reason)
    with Cluster() as running:
        yield running
    assert running.processes() == []


@pytest.fixture(params=("mpirun", "srun"))
def launcher(request, cluster) -> str:
    if request.param == "srun" and not cluster.starts_ranks():
        pytest.skip("srun --mpi=pmix does not work here: apt-get install libpmix-dev")
    return request.param


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder like a checkout after bin/setup, in which runs may be left."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(autouse=True)
def _nothing_waits_for_the_next_test(request):
    yield
    if "cluster" in request.fixturenames:
        running = request.getfixturevalue("cluster")
        running.cancel_all()


def submit(cluster: Cluster, checkout: Path, *options: str, script: str = "digits", **environment: str) -> SlurmJob:
    return cluster.submit(f"--ntasks={RANKS}", *options, f"slurm/{script}.sh", cwd=checkout, environment=SMALL | environment)


def run_of(checkout: Path, job: SlurmJob) -> Path:
    return checkout / "runs" / f"loft-digits-{job.number}"


def logged(run: Path, event: str) -> bool:
    log = run / "metrics.jsonl"
    return log.exists() and f'"{event}"' in log.read_text()


def results(run: Path) -> list[Path]:
    """A whole job's final networks: of the pretraining, and of its retrained ticket."""
    folders = [run, run / "retrained" / TICKET]
    for folder in folders:
        assert read_json(folder / "run.json")["status"] == "done"
    return [folder / "model.safetensors" for folder in folders]


@pytest.fixture(scope="module")
def undisturbed(cluster, checkout) -> SlurmJob:
    job = submit(cluster, checkout)
    assert job.wait_for_end() == "COMPLETED", job.output
    return job


def test_a_job_goes_all_the_way(checkout, undisturbed):
    run = run_of(checkout, undisturbed)
    assert len(results(run)) == 2
    assert read_json(run / "run.json")["world_size"] == RANKS and read_json(run / "run.json")["results"]["accuracy"] > 0.5
    assert [ticket.name for ticket in (run / "tickets").iterdir()] == [TICKET]
    assert undisturbed.fields["Restarts"] == "0" and undisturbed.fields["ExitCode"] == "0:0"
    assert undisturbed.output.splitlines()[-1] == f"slurm: job {undisturbed.number} is done: runs/loft-digits-{undisturbed.number}"
    assert undisturbed.processes() == []


def test_a_finished_job_that_is_queued_again_changes_nothing(cluster, checkout, undisturbed):
    def files() -> dict[Path, int]:
        return {
            file: file.stat().st_mtime_ns for file in run_of(checkout, undisturbed).rglob("*") if file.is_file() and file.name != ".lock"
        }

    before = files()
    cluster.run("scontrol", "requeue", str(undisturbed.number))
    undisturbed.restart()
    assert undisturbed.wait_for_end() == "COMPLETED", undisturbed.output
    assert files() == before


def test_tickets_of_a_job_that_died_while_drawing_them_are_drawn_anew(cluster, checkout, undisturbed):
    run = checkout / "runs" / "half"
    shutil.copytree(run_of(checkout, undisturbed), run)
    (run / ".drawing-tickets").touch()
    (run / "tickets" / TICKET).rename(run / "tickets" / "another")
    job = submit(cluster, checkout, LOFT_RUN=str(run))
    assert job.wait_for_end() == "COMPLETED", job.output
    assert [ticket.name for ticket in (run / "tickets").iterdir()] == [TICKET]
    assert not (run / ".drawing-tickets").exists()


def test_a_preempted_job_goes_on_and_ends_as_an_undisturbed_one(cluster, checkout, undisturbed, launcher):
    """Once by a job of more priority in the middle of pretraining, and once, by other schedulers' signal, in the middle of retraining."""
    job = submit(cluster, checkout, LOFT_LAUNCHER=launcher)
    run = run_of(checkout, job)
    job.wait("round", lambda: logged(run, "round"))
    urgent = cluster.submit("--partition=urgent", f"--ntasks={CPUS}", "--output=urgent-%j.out", "--wrap=true", cwd=checkout)
    job.wait_for_state("PENDING", seconds=110)  # of the two minutes' notice
    assert read_json(run / "run.json")["status"] == "interrupted"
    assert urgent.wait_for_end() == "COMPLETED"
    job.restart()
    retrained = run / "retrained" / TICKET
    job.wait("epoch of retraining", lambda: logged(retrained, "epoch"))
    job.warn("USR2")
    job.wait_for_state("PENDING", seconds=110)
    assert read_json(retrained / "run.json")["status"] == "interrupted"
    job.restart()
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.fields["Restarts"] == "2" and job.output.count("going on at step") == 2
    for ours, theirs in zip(results(run), results(run_of(checkout, undisturbed)), strict=True):
        one, other = read_tensors(ours), read_tensors(theirs)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_warning_before_the_ranks_are_there_is_not_lost(cluster, checkout, launcher):
    job = submit(cluster, checkout, LOFT_LAUNCHER=launcher)
    job.wait("job script", lambda: "start 0" in job.output)
    job.warn()
    job.warn()
    job.wait_for_state("PENDING")
    assert job.fields["Restarts"] == "1" and job.processes() == []


def test_a_job_whose_node_goes_down_goes_on_from_its_last_checkpoint(cluster, checkout):
    job = submit(cluster, checkout, LOFT_OPTIONS="--widen 1 --epochs 500 --evaluate-every 500")
    job.wait("checkpoint", lambda: any((run_of(checkout, job) / "checkpoints").glob("0*")))
    cluster.lose_node()
    job.restart()
    job.wait("going on", lambda: "going on at step" in job.output)
    assert job.fields["Restarts"] == "1"


@pytest.mark.parametrize("launcher", ["srun"], indirect=True)
def test_a_termination_of_the_ranks_alone_makes_a_requeue_under_srun(cluster, checkout, launcher):
    """What a preemption begins with where Slurm does not send USR1 before it (no preempt_send_user_signal)."""
    job = submit(cluster, checkout, LOFT_LAUNCHER=launcher, LOFT_OPTIONS="--widen 1 --epochs 500")
    job.wait("round", lambda: logged(run_of(checkout, job), "round"))
    cluster.run("scancel", "--signal=TERM", str(job.number))
    job.wait_for_state("PENDING", seconds=110)
    assert read_json(run_of(checkout, job) / "run.json")["status"] == "interrupted"


def test_a_job_near_its_time_limit_goes_back_into_the_queue(cluster, checkout):
    """Slurm looks at limits every half minute: it warns within the minute that is the limit here, or half of one after it."""
    job = submit(cluster, checkout, "--time=1", "--signal=B:USR1@50", LOFT_OPTIONS="--widen 1 --epochs 500")
    job.wait("warning", lambda: "preempted" in job.output or job.state in ENDED)
    job.wait_for_state("PENDING", *ENDED)
    assert job.state == "PENDING" and job.fields["Restarts"] == "1"
    assert read_json(run_of(checkout, job) / "run.json")["status"] == "interrupted"


def test_a_cancelled_job_is_gone_and_can_be_gone_on_with(cluster, checkout, launcher):
    options = "--widen 1 --epochs 500 --evaluate-every 500"
    job = submit(cluster, checkout, LOFT_LAUNCHER=launcher, LOFT_OPTIONS=options)
    run = run_of(checkout, job)
    job.wait("checkpoint", lambda: any((run / "checkpoints").glob("0*")))
    cluster.run("scancel", str(job.number))
    job.wait("end of all processes", lambda: job.processes() == [], seconds=60)
    assert job.wait_for_end() == "CANCELLED" and job.fields["Restarts"] == "0"
    again = submit(cluster, checkout, LOFT_LAUNCHER=launcher, LOFT_OPTIONS=options, LOFT_RUN=str(run))
    again.wait("going on", lambda: "going on at step" in again.output)


@pytest.mark.parametrize(
    ("environment", "exit_code", "line"),
    [
        ({"LOFT_OPTIONS": "--epoch 3"}, "2:0", "loft: No such option '--epoch'"),
        ({"LOFT_OPTIONS": "--widen 1 --lr 1e30"}, "1:0", "loft: what rank 0 learnt, its loss or its parameters, is not finite"),
        ({"LOFT_LAUNCHER": "aprun"}, "1:0", "slurm: LOFT_LAUNCHER=aprun is not known: mpirun or srun"),
        ({"LOFT_HOME": "/nowhere"}, "1:0", "slurm: no /nowhere/slurm/common.sh: type sbatch in the checkout of loft-hpc, or set LOFT_HOME to it"),
    ],
    ids=["option", "loss", "launcher", "home"],
)  # fmt: skip
def test_a_mistake_ends_the_job_for_good_with_a_line_that_says_why(cluster, checkout, environment, exit_code, line):
    job = submit(cluster, checkout, **environment)
    assert job.wait_for_end() == "FAILED"
    assert job.fields["Restarts"] == "0" and job.fields["ExitCode"] == exit_code
    told = [said for said in job.output.splitlines() if said.startswith(("loft: ", "slurm: ")) and ", start 0: " not in said]
    assert len(told) == 1 and told[0].startswith(line), job.output
    assert "Traceback" not in job.output


def test_a_checkout_without_its_environment(cluster, tmp_path):
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    job = submit(cluster, tmp_path)
    assert job.wait_for_end() == "FAILED"
    assert job.output == f"slurm: no .venv in {tmp_path}: run bin/setup there first\n"


def test_a_job_script_without_slurm_says_how_it_is_started():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LOFT_"))}
    result = subprocess.run(["bash", "slurm/digits.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "slurm: this is a job script for Slurm: sbatch slurm/digits.sh\n"


@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "slurm").glob("*.sh") if file.stem != "common"))
def test_slurm_takes_every_line_of_the_scripts(cluster, checkout, script):
    """On the only node there is, its CPUs and its memory."""
    asked = ("--nodes=1", "--cpus-per-task=1", "--mem=1G")
    cluster.run("sbatch", "--test-only", *asked, f"slurm/{script}.sh", cwd=checkout)


def test_a_rank_for_every_gpu_of_every_node(cluster, checkout):
    """The script for N nodes with G GPUs, one node with two: what it asks for, and its own options, to the end."""
    options = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=4G")
    given = SMALL | {"LOFT_PRESET": "digits"}
    del given["LOFT_OPTIONS"]
    job = cluster.submit(*options, "slurm/imagenet-nodes.sh", cwd=checkout, environment=given)
    assert job.wait_for_end() == "COMPLETED", job.output
    run = read_json(checkout / "runs" / f"loft-imagenet-nodes-{job.number}" / "run.json")
    assert run["world_size"] == 2 and "they share" not in job.output
    assert run["configuration"]["loft"]["shard_data"] and run["configuration"]["data"]["loader_workers"] == 0


def test_gpus_without_a_rank_end_the_job_at_once(cluster, checkout):
    """`--gpus-per-node=4` alone, one rank a node."""
    job = submit(cluster, checkout, "--ntasks=1", "--gpus-per-node=4", LOFT_OPTIONS="--epoch 3")
    assert job.wait_for_end() == "FAILED"
    told = [line for line in job.output.splitlines() if "would idle" in line]
    line = (
        "slurm: more GPUs (4) than ranks (1), so that 3 would idle: ask for a rank for each by --ntasks-per-node=4, or set LOFT_IDLE_GPUS=1"
    )
    assert told == [line] and "loft: " not in job.output
    for options, environment in ((("--gpus-per-node=4",), {"LOFT_IDLE_GPUS": "1"}), (("--gpus-per-node=1",), {})):
        job = submit(cluster, checkout, *options, LOFT_OPTIONS="--epoch 3", **environment)
        assert job.wait_for_end() == "FAILED" and "loft: No such option '--epoch'" in job.output
        assert ("more ranks (2) than GPUs (1): they share" in job.output) == ("--gpus-per-node=1" in options)


def test_a_recipe_with_data_in_another_place(cluster, checkout, tmp_path):
    """LOFT_DATA goes to every step; here there is nothing, which the first one tells."""
    options = ("--cpus-per-task=1", "--gpus-per-node=2")
    job = submit(cluster, checkout, *options, script="cifar10", LOFT_DATA=str(tmp_path / "none"), LOFT_OPTIONS="")
    assert job.wait_for_end() == "FAILED"
    assert job.fields["ExitCode"] == "1:0" and f"{tmp_path}/none" in job.output, job.output


def test_the_communication_costs_come_as_a_file(cluster, checkout, undisturbed):
    job = cluster.submit("slurm/commcost.sh", cwd=checkout)
    assert job.wait_for_end() == "COMPLETED", job.output
    report = (checkout / "commcost.txt").read_text()
    assert "preresnet18 ImageNet" in report and f"runs/loft-digits-{undisturbed.number}" in report
    assert "LoFT" in report and "handed over" in report
    own = [row for row in report.splitlines() if row.startswith(f"runs/loft-digits-{undisturbed.number} ")]
    assert len(own) > 1 and all(row.endswith("  equal") for row in own[1:])  # its totals, and the rows of the proof
