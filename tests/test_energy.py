"""Energy from counters that are made up here, its sum over ranks and its carbon; memory counted by hand and on real tensors."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loft_hpc.analysis.energy import (
    Energy,
    Meter,
    Spent,
    _cpu_seconds,
    add_up,
    carbon_grams,
    codecarbon_intensity,
    energy_of_ranks,
    gpus_of,
    inference_energy,
    one_after_another,
)
from loft_hpc.analysis.footprint import footprint, footprint_of, peak_bytes
from loft_hpc.analysis.latency import Latency, latencies
from loft_hpc.analysis.memory import kept_bytes, storage_bytes
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import architecture
from loft_hpc.models.resnet import ResidualNetwork
from loft_hpc.training.trainer import stop_statistics

from tiny import CPU, tiny

SPAN = 1_000_000


class Powercap:
    """A tree like /sys/class/powercap, with zones `name` -> (what it is, microjoules)."""

    def __init__(self, folder, **zones):
        self.folder = folder
        for name, (kind, microjoules) in zones.items():
            (self._zone(name)).mkdir(parents=True)
            (self._zone(name) / "name").write_text(f"{kind}\n")
            (self._zone(name) / "max_energy_range_uj").write_text(f"{SPAN}\n")
            self.set(name, microjoules)

    def _zone(self, name):
        return self.folder / name.replace("_", ":").replace("intel", "intel-rapl")

    def set(self, name, microjoules):
        fresh = self.folder / "fresh"
        fresh.write_text(f"{microjoules}\n")
        fresh.replace(self._zone(name) / "energy_uj")  # like the kernel's, never half written

    def forbid(self, name):
        """As good as a file without permission, for root too: reading a folder is an OSError."""
        (self._zone(name) / "energy_uj").unlink()
        (self._zone(name) / "energy_uj").mkdir()


class Nvml:
    """Like pynvml, with the millijoules of some GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self, **millijoules):
        self.millijoules = {f"GPU-{name}": value for name, value in millijoules.items()}
        self.broken = False

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return SimpleNamespace(uuid=uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.nvmlInit()
        return self.millijoules[handle.uuid]


class Clock:
    """CPU seconds, as told."""

    now = 100.0

    def __call__(self):
        return self.now


def spent_by(meter, *changes) -> Spent:
    begin = meter.read()
    for change in changes:
        change()
        meter.read()
    return meter.since(begin)


def test_two_packages_are_added_and_neither_their_parts_nor_the_platform(tmp_path):
    tree = Powercap(
        tmp_path, intel_0=("package-0", 100), intel_1=("package-1", 7), intel_0_0=("core", 50), intel_0_1=("package-0-die-0", 5), intel_2=("psys", 900)
    )  # fmt: skip
    meter = Meter(powercap=tmp_path)
    changes = {"intel_0": 400_100, "intel_1": 200_007, "intel_0_0": 90_000, "intel_0_1": 80_000, "intel_2": 999_999}
    spent = spent_by(meter, lambda: [tree.set(*change) for change in changes.items()])
    assert spent.rapl == pytest.approx({"intel-rapl:0": 0.4, "intel-rapl:1": 0.2})
    energy = add_up([spent])
    assert energy.joules == pytest.approx(0.6) and (energy.source, energy.measured) == ("rapl", True)
    assert energy.seconds == spent.seconds > 0


def test_a_counter_that_starts_anew(tmp_path):
    """From 900,000 to 50,000 of 1,000,000 microjoules: 0.15 J. Twice within a measurement, if somebody looks in between."""
    tree = Powercap(tmp_path, intel_0=("package-0", 900_000))
    meter = Meter(powercap=tmp_path)
    spent = spent_by(meter, *(lambda value=value: tree.set("intel_0", value) for value in (50_000, 800_000, 10_000)))
    assert spent.rapl["intel-rapl:0"] == pytest.approx(0.15 + 0.75 + 0.21)
    assert spent_by(meter).rapl == {"intel-rapl:0": 0}


def test_readings_never_decrease(tmp_path):
    nvml, clock = Nvml(a=5000), Clock()
    Powercap(tmp_path, intel_0=("package-0", 900_000))
    meter = Meter(["GPU-a"], powercap=tmp_path, nvml=nvml, cpu_seconds=clock)
    first = meter.read()
    nvml.millijoules["GPU-a"], clock.now = 0, 99.0  # the driver was loaded anew; a child process went unaccounted for
    second = meter.read()
    assert second.nvml == first.nvml and second.cpu_seconds == first.cpu_seconds
    nvml.millijoules["GPU-a"] = 3000
    assert meter.since(second).nvml == {"GPU-a": 3}


def test_a_file_that_cannot_be_read(tmp_path):
    """All packages or none: half a host would pass for a whole one."""
    clock = Clock()
    tree = Powercap(tmp_path, intel_0=("package-0", 5), intel_1=("package-1", 5))
    meter = Meter(watts_per_core=10, powercap=tmp_path, cpu_seconds=clock)
    begin = meter.read()
    tree.forbid("intel_1")
    clock.now += 3
    assert add_up([meter.since(begin)]) == Energy(30, pytest.approx(0, abs=1), "estimate", False)
    assert Meter(powercap=tmp_path).read().rapl is None
    assert Meter(powercap=tmp_path / "nowhere").read().rapl is None
    (tmp_path / "intel-rapl:0" / "name").write_bytes(b"package\xff")
    assert Meter(powercap=tmp_path).read().rapl is None


@pytest.mark.parametrize("packages", [True, False])
@pytest.mark.parametrize("gpus", [True, False])
def test_a_gpu_and_its_host(tmp_path, packages, gpus):
    """What cannot be read is named; an estimate is never mixed with what one process measured."""
    tree, nvml, clock = Powercap(tmp_path, intel_0=("package-0" if packages else "psys", 0)), Nvml(a=1000, b=1000), Clock()
    nvml.broken = not gpus
    meter = Meter(["GPU-a"], watts_per_core=2, powercap=tmp_path, nvml=nvml, cpu_seconds=clock)
    begin = meter.read()
    tree.set("intel_0", 250_000)
    nvml.millijoules |= {"GPU-a": 8000, "GPU-b": 9000}
    clock.now += 1.5
    energy = add_up([meter.since(begin)])
    joules, source = {
        (True, True): (7.25, "nvml+rapl"),
        (True, False): (7, "nvml (without the processors)"),
        (False, True): (0.25, "rapl (without the GPUs)"),
        (False, False): (3, "estimate (without the GPUs)"),
    }[gpus, packages]
    assert energy.joules == pytest.approx(joules) and energy.source == source
    assert energy.measured == (gpus or packages)


def test_no_gpu_by_that_name_and_no_pynvml(tmp_path, monkeypatch):
    assert Meter(["GPU-z"], powercap=tmp_path, nvml=Nvml(a=1)).read().nvml is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter(["GPU-z"], powercap=tmp_path).read().nvml is None
    assert gpus_of(CPU) == ()


def test_an_estimate_is_of_busy_seconds():
    """Also of a child process, while it lives and afterwards; sleeping costs nothing."""
    begin = _cpu_seconds()
    time.sleep(0.2)
    idle = _cpu_seconds() - begin
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-S", "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        living = _cpu_seconds() - begin
        child.communicate("\n")
    ended = _cpu_seconds() - begin
    assert idle < 0.1 and ended > 0.25
    if Path("/proc/thread-self/children").exists():  # CONFIG_PROC_CHILDREN
        assert 0.25 < living < ended + 0.05


@pytest.mark.parametrize("watts", [0, -1, float("nan"), float("inf")])
def test_impossible_watts(watts):
    with pytest.raises(LoftError, match="watts per core"):
        Meter(watts_per_core=watts)


def test_the_thread_sees_every_new_start(tmp_path, monkeypatch):
    monkeypatch.setattr("loft_hpc.analysis.energy._EVERY_SECONDS", 0.001)
    tree, readings = Powercap(tmp_path, intel_0=("package-0", 900_000)), []
    with Meter(powercap=tmp_path, cpu_seconds=lambda: readings.append(0) or 0.0) as meter:
        begin = meter.read()
        for value in (100_000, 900_000, 100_000):
            tree.set("intel_0", value)
            seen, deadline = len(readings) + 2, time.monotonic() + 20  # the first may have begun before
            while len(readings) < seen:
                assert time.monotonic() < deadline
                time.sleep(0.001)
    assert meter.since(begin).rapl["intel-rapl:0"] == pytest.approx(0.2 + 0.8 + 0.2)
    count = len(readings)
    time.sleep(0.02)
    assert len(readings) == count  # the thread has ended


def test_hosts_and_gpus_count_once():
    """Two hosts of two ranks; the ranks of the second share a GPU. Whoever comes first is believed."""
    one, two, shared = {"GPU-1": 10.0}, {"GPU-2": 20.0}, {"GPU-3": 40.0}
    ranks = [
        Spent(5, "first", True, one, {"intel-rapl:0": 100.0}, 1),
        Spent(6, "first", True, two, {"intel-rapl:0": 101.0}, 1),
        Spent(5, "second", True, shared, {"intel-rapl:0": 200.0}, 1),
        Spent(5, "second", True, {"GPU-3": 41.0}, None, 1),
    ]
    assert add_up(ranks) == Energy(370, 6, "nvml+rapl", True)


def test_ranks_that_measure_differently():
    def rank(host, gpu=None, package=None, on_gpu=False):
        return Spent(1, host, on_gpu, gpu and {f"GPU-{host}": gpu}, package and {"intel-rapl:0": package}, 3)

    assert add_up([rank("a"), rank("a"), rank("b")]) == Energy(9, 1, "estimate", False)
    assert add_up([rank("a"), rank("a", package=50)]) == Energy(50, 1, "rapl", True)  # the host's first rank alone need read it
    assert add_up([rank("a", package=50), rank("b")]) == Energy(53, 1, "rapl+estimate", False)
    assert add_up([rank("a", 7, on_gpu=True), rank("b", 7, 50, on_gpu=True)]) == Energy(64, 1, "nvml+rapl (without some processors)", True)
    broken = [rank("a", 7, 50, on_gpu=True), rank("b", None, 50, on_gpu=True)]
    assert add_up(broken) == Energy(107, 1, "nvml+rapl (without some GPUs)", True)
    both = [rank("a", 7, on_gpu=True), rank("b", None, 50, on_gpu=True)]
    assert add_up(both).source == "nvml+rapl (without some GPUs and some processors)"


def test_every_rank_gets_the_sum():
    mine = Spent(2, "a", False, None, None, 3)
    world = SimpleNamespace(gather_objects=lambda value: [value, Spent(1, "b", False, None, None, 4)])
    assert energy_of_ranks(mine, world) == Energy(7, 2, "estimate", False)


def test_legs_of_a_run():
    legs = [Energy(5, 2, "rapl", True), Energy(6, 3, "estimate", False), Energy(1, 1, "rapl", True)]
    assert one_after_another(legs) == Energy(12, 6, "rapl, estimate", False)


def test_carbon():
    kilowatt_hour = Energy(3.6e6, 10, "rapl", True)
    assert kilowatt_hour.kilowatt_hours == 1
    assert carbon_grams(kilowatt_hour) == 475 and carbon_grams(Energy(1.8e6, 1, "rapl", True), 50) == 25
    assert carbon_grams(kilowatt_hour, 0) == 0
    for impossible in (-1, float("nan"), float("inf")):
        with pytest.raises(LoftError, match="--carbon-intensity"):
            carbon_grams(kilowatt_hour, impossible)


def test_codecarbons_table_is_read_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "carbon_of_the_test"
    (package / "data/private_infra").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoftError, match="install version 3"):
        codecarbon_intensity("DEU", package.name)
    rows = {"DEU": {"carbon_intensity": 380.95, "year": 2023}, "OLD": {"total": 1}, "BAD": {"carbon_intensity": -3}}
    (package / "data/private_infra/global_energy_mix.json").write_text(json.dumps(rows))
    assert codecarbon_intensity("deu", package.name) == 380.95
    for unknown in ("OLD", "BAD", "Germany"):
        with pytest.raises(LoftError, match=f"of '{unknown}'"):
            codecarbon_intensity(unknown, package.name)
    with pytest.raises(LoftError, match="pip install codecarbon, or give --carbon-intensity"):
        codecarbon_intensity("DEU", "no_such_carbon")


def test_inference_energy_follows_the_work(tmp_path):
    """A counter that adds a millijoule a pass and ten for the larger network: joules per 1000 images are known."""
    nvml = Nvml(a=0)

    class Costly(nn.Module):
        def __init__(self, millijoules):
            super().__init__()
            self.weight, self.millijoules = nn.Parameter(torch.ones(1)), millijoules

        def forward(self, x):
            nvml.millijoules["GPU-a"] += self.millijoules
            return x * self.weight

    meter = Meter(["GPU-a"], powercap=tmp_path, nvml=nvml)
    ticket, dense = inference_energy([Costly(1), Costly(10)], (1, 2, 2), 4, 2, meter, stretch_seconds=0.02)
    assert ticket.joules_per_1000_images == pytest.approx(0.25) and dense.joules_per_1000_images == pytest.approx(2.5)
    assert ticket.images % 4 == 0 and ticket.energy.seconds >= 0.04
    assert ticket.energy.source == "nvml (without the processors)"


def test_throughput():
    assert Latency(0.02, 0.01, 0.03, 5, 64).throughput == 3200
    (measured,) = latencies([nn.Conv2d(1, 1, 1)], (1, 2, 2), 3, 3)
    assert measured.throughput == 3 / measured.median_seconds


def one_convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)
    )


def by_hand() -> nn.Module:
    """A convolution of 3 to 4 channels, a normalisation, and 10 classes of what is left of 4x4 pixels."""
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10))


def test_a_tiny_network_counted_by_hand():
    counted = footprint_of(by_hand, (3, 4, 4), images=5)
    parameters = 4 * (4 * 3 * 9 + 4 + 4 + 64 * 10 + 10)
    statistics = 4 * (4 + 4) + 8  # means, variances, and one 64-bit count of batches
    maps, classes = 4 * 5 * 64, 4 * 5 * 10  # of the 5 images, in float32
    assert (counted.parameters_bytes, counted.statistics_bytes) == (parameters, statistics)
    # the convolution's output while the normalisation writes its own
    assert counted.inference_activations_bytes == 2 * maps
    assert counted.inference_peak_bytes == parameters + statistics + 2 * maps
    # kept: the convolution's output, the normalisation's (ReLU writes over it) and its 2 numbers a channel;
    # the output, the logarithms of its probabilities, and the loss with its weight
    kept = 2 * maps + 4 * 2 * 4 + 2 * classes + 2 * 4
    assert counted.training_activations_bytes == kept
    assert counted.training_bytes == 3 * parameters + statistics + kept


@pytest.mark.parametrize("described", [tiny(), tiny(pre_activation=True), architecture("resnet20", 10, 1)], ids=["post", "pre", "resnet20"])
def test_footprints_are_those_of_real_tensors(described):
    widths = {name: width // 2 + 1 for name, width in described.hidden_widths().items()}
    images, labels = torch.randn(6, 1, 16, 16), torch.zeros(6, dtype=torch.int64)
    counted = footprint(described, widths, 16, 6)
    network = ResidualNetwork(described, widths).eval()
    assert counted.parameters_bytes == storage_bytes(network.parameters())
    assert counted.statistics_bytes == storage_bytes(network.buffers())
    own = [*network.parameters(), *network.buffers(), images]
    assert counted.inference_activations_bytes == peak_bytes(lambda: network(images), own)
    network.train()
    stop_statistics(network)

    def forward():
        output = network(images)
        return [output, F.cross_entropy(output, labels, reduction="sum")]

    assert counted.training_activations_bytes == kept_bytes(forward, [*network.parameters(), images, labels])


def test_fewer_blocks_and_fewer_filters_take_less():
    dense = architecture("resnet20", 10)
    whole = footprint(dense, None, 32, 8)
    shallow = footprint(replace(dense, blocks=(2, 3, 3)), None, 32, 8)
    narrow = footprint(dense, {name: width // 2 for name, width in dense.hidden_widths().items()}, 32, 8)
    assert shallow.training_activations_bytes < whole.training_activations_bytes
    assert shallow.inference_activations_bytes == whole.inference_activations_bytes  # one block at a time
    assert narrow.training_bytes < whole.training_bytes and narrow.parameters_bytes < 0.6 * whole.parameters_bytes
    assert footprint(dense, None, 32, 16).inference_activations_bytes == 2 * whole.inference_activations_bytes
