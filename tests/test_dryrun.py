"""`loft pretrain --dry-run`: the recipe resolved, bytes by the formulas, memory counted before anything is allocated."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loft_hpc.analysis.memory import activations, kept_bytes, storage_bytes
from loft_hpc.cli.main import run
from loft_hpc.data.embedded import digits, synthetic, textures
from loft_hpc.data.registry import known_shape
from loft_hpc.jobs.memory import stage_activations
from loft_hpc.jobs.prediction import planned
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import architecture
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.pipeline.stages import Part, Stage
from loft_hpc.training.trainer import stop_statistics

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
    assert "--milestone " in printed and "GiB" in printed
    assert run(["pretrain", "--dry-run", "--workers", "2", "--cluster", "ethernet-1g"]) == 0
    printed = capsys.readouterr().out
    assert "s an epoch" in printed and "--workers S" not in printed


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
    without, recomputed = (
        PretrainSettings(model="resnet20", strategy="gpipe", batch_size=64, pipeline=PipelineSettings(m, "balanced", recompute))
        for recompute in (False, True)
    )
    shape, network = planned(without)
    one = activations(lambda: Stage(ResidualNetwork(network, network.hidden_widths()), part), (1, 8, 8), 16, True, False, False)
    assert one.result == 16 * 4 * 32 * 4 * 4
    assert stage_activations(without, shape, network, part) == m * (one.network + one.result)
    assert stage_activations(recomputed, shape, network, part) == one.network + m * one.result


@pytest.mark.parametrize(("name", "opened"), [("digits", digits), ("textures", textures), ("synthetic", synthetic)])
def test_data_sets_in_memory(name, opened):
    data = opened(CPU)
    held = storage_bytes([*data._train, *data._test])
    assert known_shape(name).resident_bytes == held


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--dry-run", "--dataset", "imagefolder"), 2, "imagefolder has no shape of its own"),
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
