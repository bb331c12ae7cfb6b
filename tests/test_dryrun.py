"""`loft pretrain --dry-run`: the recipe resolved, bytes by the formulas, memory counted before anything is allocated."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loft_hpc.analysis.memory import activations, kept_bytes, storage_bytes
from loft_hpc.cli.main import run
from loft_hpc.data.embedded import digits, synthetic, textures
from loft_hpc.data.registry import known_shape
from loft_hpc.jobs.memory import stage_activations
from loft_hpc.jobs.prediction import Case
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import architecture
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.pipeline.stages import Part, Stage
from loft_hpc.training.trainer import stop_statistics

from test_data import make_folder
from tiny import CPU

POSTER = ("--preset", "imagenet-preresnet18", "--workers", "4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder without data; a dry run leaves it as empty as it was."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


def planned_json(capsys, *options: str) -> dict:
    assert run(["pretrain", *options, "--dry-run", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_option_says_where_it_came_from(capsys):
    recipe = planned_json(capsys, *POSTER, "--lr", "0.2")["recipe"]
    assert recipe["lr"] == {"value": 0.2, "source": "typed"}
    assert recipe["local_iterations"] == {"value": 15, "source": "preset"}
    assert recipe["exchange"] == {"value": "allgather", "source": "default"}
    assert recipe["image_size"] == {"value": 224, "source": "default"}  # the data set's own
    assert recipe["milestones"]["value"] == [0.25, 0.5, 0.75] and "micro_batches" not in recipe and "rounds" not in recipe
    other = planned_json(capsys, "--strategy", "gpipe", "--micro-batches", "2")["recipe"]
    assert other["micro_batches"] == {"value": 2, "source": "typed"} and "exchange" not in other
    assert "epochs" not in planned_json(capsys, "--rounds", "3")["recipe"]


def test_a_round_of_the_posters_imagenet_row(capsys):
    """facts/loft.md: P, C, and 1284.8371G in 6000 transfers of 4 workers."""
    plan = planned_json(capsys, *POSTER)
    assert (plan["partitioned_parameters"], plan["shared_parameters"]) == (12_389_888, 10_286_248)
    (rounds,) = plan["exchanges"]
    assert 6000 * rounds["payload_sent_bytes"] == pytest.approx(1284.8371e9, abs=5e4)
    assert rounds["payload_sent_bytes_per_rank"] == rounds["payload_sent_bytes"] / 4
    assert (plan["steps_per_epoch"], plan["steps"]) == (1_281_167 // 256, 20 * (1_281_167 // 256))
    assert plan["rounds"] == rounds["count"] == 6672
    (rank,) = plan["memory"]
    own = 12_389_888 // 4 + 10_286_248
    assert rank["parameters_bytes"] == rank["gradients_bytes"] == rank["momentum_bytes"] == 4 * own
    assert rank["exchange_bytes"] == 4 * 12_389_888 and rank["averaging_bytes"] == 4 * 10_286_248
    assert rank["input_batch_bytes"] == 256 * (4 * 3 * 224 * 224 + 8) and rank["images_bytes"] == 0
    network = architecture("preresnet18", 1000, stem="imagenet", widen=2)
    with torch.device("meta"):
        statistics = storage_bytes(ResidualNetwork(network, network.hidden_widths()).buffers())
    assert rank["evaluation_network_bytes"] == 4 * (12_389_888 + 10_286_248) + statistics


def test_rounds_that_do_not_average(capsys):
    plan = planned_json(capsys, "--dataset", "cifar10", "--workers", "4", "--average-every", "4", "--epochs", "1", "--batch-size", "64")
    averaging, other = plan["exchanges"]
    # 781 steps in rounds of 8: 98, the last one with the epoch's end; 24 multiples of 4 and the last
    assert (averaging["count"], other["count"]) == (25, 73)
    assert [flow["purpose"] for flow in averaging["operations"]] == ["partitioned", "shared"]
    assert [flow["purpose"] for flow in other["operations"]] == ["partitioned"]
    total = 25 * averaging["wire_bytes"] + 73 * other["wire_bytes"]
    assert plan["training"]["wire_bytes"] == total


@pytest.mark.parametrize("strategy", ["loft", "data-parallel", "gpipe"])
def test_bytes_and_seconds_are_those_of_commcost(capsys, strategy):
    options = (
        "--model",
        "resnet18",
        "--dataset",
        "cifar100",
        "--strategy",
        strategy,
        "--workers",
        "2",
        "--cluster",
        "ethernet-1g",
        "--epochs",
        "3",
    )
    plan = planned_json(capsys, *options)
    assert run(["commcost", *options, "--format", "json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    for key, name in (("payload_received_bytes", "delivered_bytes"), ("payload_sent_bytes", "handed_over_bytes"), ("wire_bytes",) * 2):
        assert plan["training"][key] == case[name]
    assert plan["epoch_seconds"] == case["epoch_seconds"] and plan["training_seconds"] == pytest.approx(3 * case["epoch_seconds"])
    assert len(plan["memory"]) == (2 if strategy == "gpipe" else 1)


def test_for_people(capsys):
    assert run(["pretrain", "--preset", "cifar10-resnet34", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "--workers S plans for S" in printed and "--cluster FILE" in printed and "predicted" not in printed
    assert "--milestone " in printed and "GiB" in printed and "WARNING" not in printed
    assert printed.splitlines()[-1] == "next: this command, without --dry-run and its options"
    assert run(["pretrain", "--dry-run", "--workers", "2", "--cluster", "ethernet-1g"]) == 0
    printed = capsys.readouterr().out
    assert "s an epoch" in printed and "--workers S" not in printed and "worker-hours" in printed


def on_hdr(capsys, *options: str) -> dict:
    return planned_json(capsys, "--preset", "imagenet-preresnet18", "--cluster", "infiniband-hdr", *options)


def test_four_times_the_gpus_for_a_tenth_less_time_is_told(capsys):
    """A new user saw 5.24 h on 4 workers, 4.69 h on 16, 0.29 h with shards; data-parallel 119.5 s an epoch."""
    four, sixteen = on_hdr(capsys, "--workers", "4"), on_hdr(capsys, "--workers", "16")
    sharded = on_hdr(capsys, "--workers", "16", "--shard-data")
    hours = [plan["training_seconds"] / 3600 for plan in (four, sixteen, sharded)]
    assert hours == pytest.approx([5.24, 4.69, 0.29], abs=0.005)
    assert [plan["worker_seconds"] / 3600 for plan in (four, sixteen)] == pytest.approx([21, 75], abs=0.5)
    assert sixteen["images"] == 4 * four["images"] == 16 * 20 * (1_281_167 // 256) * 256
    assert sharded["images"] == 16 * 20 * (1_281_167 // 16 // 256) * 256
    shards, parallel, pipeline = sixteen["beside"]
    assert pipeline["options"] == "--strategy gpipe" and "16" in pipeline["impossible"]
    assert (shards["seconds"], shards["images"]) == (sharded["training_seconds"], sharded["images"])
    assert parallel["options"] == "--strategy data-parallel"
    assert parallel["seconds"] == pytest.approx(20 * 119.5, rel=0.001)
    assert (sixteen["fewer_workers"]["workers"], sixteen["fewer_workers"]["seconds"]) == (4, four["training_seconds"])
    for words in (
        "16 workers take 4.69 h",
        "every worker sees all images",
        "--shard-data (17.5 min, 4.67 GPU-hours)",
        "4 workers (5.24 h, 21 GPU-hours)",
    ):
        assert words in sixteen["warning"], sixteen["warning"]
    assert sharded["warning"] is None and [one["options"] for one in sharded["beside"]] == ["--strategy data-parallel", "--strategy gpipe"]


def test_the_first_lines_are_the_answer(capsys):
    assert run(["pretrain", *POSTER, "--dry-run", "--cluster", "infiniband-hdr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dry run: preresnet18 on imagenet with loft over 4 workers")
    assert lines[1] == (
        "images of all workers together: 102,481,920 (20 epochs of 5,124,096); each worker sees all images, and --shard-data splits them"
    )
    assert lines[2].startswith("wall time: 5.24 h, 21 GPU-hours")
    ways = ["as asked", "with --shard-data", "with --strategy data-parallel", "with --strategy gpipe"]
    assert [line.split("  ")[0] for line in lines[8:12]] == ways
    assert lines[-1].startswith("next: mpirun -np 4 with this command")


def test_what_more_workers_make_shorter_is_not_warned_of(capsys):
    assert on_hdr(capsys, "--workers", "2")["warning"] is None
    alone = planned_json(capsys, "--cluster", "ethernet-1g", "--workers", "1")
    assert alone["beside"] == [] and alone["fewer_workers"] is None and alone["warning"] is None
    options = ("--rounds", "500", "--workers", "16", "--cluster", "ethernet-1g", "--dataset", "cifar10")
    rounds = planned_json(capsys, *options)
    assert rounds["beside"] == [] and "--shard-data" not in rounds["warning"]


def test_a_way_that_cannot_be_says_why(capsys):
    plan = planned_json(capsys, "--workers", "16", "--batch-size", "16")
    assert [bool(one["impossible"]) for one in plan["beside"]] == [False, True, True]
    assert "normalisation needs 2" in plan["beside"][1]["impossible"] and plan["beside"][1]["images"] is None


def test_images_on_disk_are_described_or_counted_and_nothing_is_written(capsys, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    folder = make_folder(tmp_path_factory.mktemp("flowers"))
    before = sorted(folder.rglob("*"))
    options = ("--dataset", "imagefolder", "--batch-size", "4", "--image-size", "32")
    read = planned_json(capsys, *options, "--data-dir", str(folder))
    train = list((folder / "train").rglob("*.*"))
    assert (read["data_train_images"], read["data_classes"]) == (len(train), len(list((folder / "train").iterdir())))
    assert read["data_known_from"] == f"by the index of {folder}" and sorted(folder.rglob("*")) == before
    assert not list(Path.home().iterdir())
    numbers = ("--classes", str(read["data_classes"]), "--images", str(read["data_train_images"]))
    told = planned_json(capsys, *options, *numbers)
    assert {key: told[key] for key in ("images", "steps", "parameters", "memory")} == {
        key: read[key] for key in ("images", "steps", "parameters", "memory")
    }
    (folder / "val").rename(folder / "test")
    assert run(["pretrain", "--dry-run", *options, "--data-dir", str(folder)]) == 1
    assert "looked for" in capsys.readouterr().err


def test_memory_of_a_gpu_without_a_gpu(capsys):
    """The poster's network; 4 ranks; facts/loft.md: P and C."""
    P, C = 12_389_888, 10_286_248
    (here,) = planned_json(capsys, *POSTER, "--device", "cpu")["memory"]
    plan = planned_json(capsys, *POSTER, "--device", "cuda")
    (gpu,) = plan["memory"]
    assert plan["memory_device"] == "cuda"
    assert gpu["exchange_bytes"] == here["exchange_bytes"] + 8 * P // 4  # two tables of 4 bytes a parameter of its own
    assert gpu["staging_bytes"] == 4 * (P + C) + 4 * (P + P // 4) + 4 * C  # broadcasts, all-gather, all-reduce
    assert gpu["host_bytes"] == gpu["staging_bytes"] + here["initial_network_bytes"]
    assert here["host_bytes"] == here["staging_bytes"] == 0
    assert gpu["next_batch_bytes"] == gpu["input_batch_bytes"] + 256 * 3 * 224 * 224 and here["next_batch_bytes"] == 0
    for same in ("parameters", "gradients", "momentum", "averaging", "activations", "input_batch"):
        assert gpu[f"{same}_bytes"] == here[f"{same}_bytes"]
    difference = 8 * P // 4 - here["initial_network_bytes"] + gpu["next_batch_bytes"]
    assert gpu["total_bytes"] - here["total_bytes"] == difference


@pytest.mark.parametrize(
    ("options", "device"),
    [
        (("--cluster", "infiniband-hdr"), "cuda"),
        (("--cluster", "ethernet-1g"), "cpu"),
        (("--cluster", "infiniband-hdr", "--device", "cpu"), "cpu"),
        (("--precision", "bfloat16"), "cuda"),
    ],
)
def test_the_device_that_memory_is_counted_for(capsys, options, device):
    assert planned_json(capsys, *options)["memory_device"] == device
    assert run(["pretrain", "--dry-run", *options]) == 0
    assert f"memory on a {'GPU' if device == 'cuda' else 'CPU'}" in capsys.readouterr().out


def test_one_convolution_counted_by_hand():
    """Normalisation keeps what it is given and 2 numbers a channel, ReLU what it gives; the input is not counted."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    images = 5
    kept = activations(build, (3, 6, 7), images, begins=True, ends=False, autocast=False)
    output = 4 * images * 4 * 6 * 7
    assert (kept.network, kept.result) == (output + 4 * 2 * 4, output)


@pytest.mark.parametrize(
    ("model", "stem", "size"),
    [("resnet20", "cifar", 32), ("preresnet20", "cifar", 8), ("resnet18", "imagenet", 65), ("preresnet18", "imagenet", 64)],
)
def test_activations_are_those_of_a_real_forward_pass(model, stem, size):
    described = architecture(model, 10, 3, stem)
    widths = {name: width // 2 + 1 for name, width in described.hidden_widths().items()}
    network = ResidualNetwork(described, widths).to(memory_format=torch.channels_last).train()
    stop_statistics(network)
    images = torch.randn(6, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(6, dtype=torch.int64)

    def forward(autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = network(images).float()
        return [output, F.cross_entropy(output, labels, reduction="sum")]

    # in bfloat16 a CPU keeps two float32 a channel of every normalisation, tensors without contents two bfloat16
    channels = sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    for autocast, difference in ((False, 0), (True, 2 * 2 * channels)):
        real = kept_bytes(lambda autocast=autocast: forward(autocast), [*network.parameters(), images, labels])
        counted = activations(lambda: ResidualNetwork(described, widths), (3, size, size), 6, True, True, autocast)
        assert counted.network + counted.result == real - difference


def test_recomputation_keeps_one_micro_batch():
    """In place of m; what goes to the next stage is kept of every one."""
    part, m = Part(1, 4, 9), 4
    gpipe = {"model": "resnet20", "strategy": "gpipe", "batch_size": 64}
    without, recomputed = (
        Case.of(PretrainSettings(**gpipe, pipeline=PipelineSettings(m, "balanced", recompute)))
        for recompute in (False, True)
    )  # fmt: skip
    network = without.network
    one = activations(lambda: Stage(ResidualNetwork(network, network.hidden_widths()), part), (1, 8, 8), 16, True, False, False)
    assert one.result == 16 * 4 * 32 * 4 * 4
    assert stage_activations(without, part) == m * (one.network + one.result)
    assert stage_activations(recomputed, part) == one.network + m * one.result


@pytest.mark.parametrize(("name", "opened"), [("digits", digits), ("textures", textures), ("synthetic", synthetic)])
def test_data_sets_in_memory(name, opened):
    data = opened(CPU)
    held = storage_bytes([*data._train, *data._test])
    assert known_shape(name).resident_bytes == held


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--dry-run", "--dataset", "imagefolder"), 2, "or describe the images: --classes N --images N"),
        (("--dry-run", "--dataset", "imagefolder", "--classes", "3"), 2, "give both"),
        (("--dry-run", "--classes", "3", "--images", "30"), 2, "omit them for digits"),
        (("--images", "30"), 2, "--images belongs to --dry-run"),
        (("--dry-run", "--resume", "--run", "x"), 2, "omit --resume"),
        (("--workers", "4"), 2, "--workers belongs to --dry-run"),
        (("--cluster", "ethernet-1g"), 2, "--cluster belongs to --dry-run"),
        (("--dry-run", "--workers", "0"), 2, "0 is not in the range"),
        (("--dry-run", "--cluster", "nowhere"), 1, "no cluster file nowhere"),
        (("--dry-run", "--workers", "1000"), 1, "ranks cannot share"),
        (("--dry-run", "--workers", "9", "--strategy", "gpipe"), 1, "too few for 9 ranks"),
        (("--dry-run", "--precision", "bfloat16", "--device", "cpu"), 1, "is for GPUs"),
        (("--dry-run", "--batch-size", "2000"), 2, "--batch-size 2000 is larger than 1437 images"),
    ],
)
def test_mistakes(capsys, options, code, told):
    assert run(["pretrain", *options]) == code
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
