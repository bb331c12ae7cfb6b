"""Energy between two moments, from counters where this machine has readable ones, and the carbon behind it.

`Energy.source` names what the joules come from:

    nvml      the energy counters of the GPUs that are computed on (NVML, millijoules; Volta or newer)
    rapl      the energy counters of the host's processors (Linux powercap, microjoules; since Linux 5.10 root alone may read them)
    estimate  CPU seconds of the processes themselves times watts per core, where no counter can be read

A counter counts its whole GPU or its whole processor: idling, and what others do on a shared node, count too. RAPL's packages are
processors with their caches and no memory modules. Of fans, disks, network and power supply there is no source.
"""

import math
import os
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from loft_hpc.analysis.latency import synchronise
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError
from loft_hpc.files import read_json, read_text

WATTS_PER_CORE = 12.0
"""Of a busy core with its share of the processor: what Green Algorithms takes for one that it does not know ("Any" in its TDP_cpu.csv;
Lannelongue et al. 2021, doi 10.1002/advs.202100707). Its list goes from 4 W (64 cores) to 24 W (4 cores): an order of magnitude, no more."""

WORLD_GRAMS_PER_KWH = 475.0
"""CO2 of a kilowatt-hour of electricity, the world's average of 2018 (IEA, Global Energy & CO2 Status Report 2019), which CodeCarbon too
takes where it knows no country. Ember's figure for 2023 is 481. Countries differ by a factor of twenty."""

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_CODECARBON_TABLE = "data/private_infra/global_energy_mix.json"
_EVERY_SECONDS = 60.0
"""A package's counter starts anew after some 262 kJ: at 4 kW, which none draws, in 65 s."""


@dataclass(frozen=True)
class Energy:
    """Between two moments."""

    joules: float
    seconds: float
    source: str
    """`nvml+rapl`, `nvml`, `rapl` or `estimate`, or several of them over the ranks, and in brackets what is used but not counted."""
    measured: bool
    """Whether counters alone are behind the joules."""

    @property
    def kilowatt_hours(self) -> float:
        return self.joules / JOULES_PER_KWH


@dataclass(frozen=True)
class Reading:
    """What a meter has counted up to one moment: joules by counter, or None where there is none to read."""

    at_seconds: float
    nvml: Mapping[str, float] | None
    rapl: Mapping[str, float] | None
    cpu_seconds: float


@dataclass(frozen=True)
class Spent:
    """What one process read between two moments, with the names of its counters: others may have read the same ones."""

    seconds: float
    host: str
    on_gpu: bool
    nvml: Mapping[str, float] | None
    """Joules of its GPUs, by UUID; None without a GPU, and where not all can be read."""
    rapl: Mapping[str, float] | None
    """Joules of its host's processors, by zone; None where not all can be read."""
    estimate: float
    """Joules of its own CPU seconds, those of its child processes included."""


class Meter:
    """Counters of this host and of this process's GPUs. Reading them never fails: what cannot be read, now or later, is left out.

    Within a `with`, a thread reads every minute, so that no counter starts anew twice unseen. Without, readings more than 20 minutes apart
    may miss joules.
    """

    def __init__(
        self, gpus: Sequence[str] = (), watts_per_core: float = WATTS_PER_CORE, powercap: Path = POWERCAP, nvml: Any = None,
        cpu_seconds: Callable[[], float] | None = None,
    ):  # fmt: skip
        """`gpus`: as `gpus_of` names them; `nvml`: a module like pynvml, which is imported where none is given.

        Raises LoftError where `watts_per_core` is no positive number.
        """
        if not 0 < watts_per_core < math.inf:
            raise LoftError(f"{watts_per_core:g} watts per core are impossible: give a positive number")
        self._watts, self._cpu_seconds, self._host = watts_per_core, cpu_seconds or _cpu_seconds, _host()
        self._on_gpu = bool(gpus)
        nvml = nvml or (_pynvml() if gpus else None)
        self._nvml = _Counters(partial(_gpu_counters, gpus, nvml), (OSError, AttributeError, getattr(nvml, "NVMLError", OSError)))
        self._rapl = _Counters(partial(_packages, powercap), (OSError, ValueError))
        self._busiest = 0.0
        self._lock, self._over, self._thread = threading.Lock(), threading.Event(), None

    def read(self) -> Reading:
        """From no reading to the next does anything decrease."""
        with self._lock:
            self._busiest = max(self._busiest, self._cpu_seconds())
            return Reading(time.perf_counter(), self._nvml.joules(), self._rapl.joules(), self._busiest)

    def since(self, begin: Reading) -> Spent:
        end = self.read()
        estimate = self._watts * (end.cpu_seconds - begin.cpu_seconds)
        nvml, rapl = _difference(begin.nvml, end.nvml), _difference(begin.rapl, end.rapl)
        return Spent(end.at_seconds - begin.at_seconds, self._host, self._on_gpu, nvml, rapl, estimate)

    def __enter__(self) -> "Meter":
        self._over.clear()
        self._thread = threading.Thread(target=self._keep_reading, name="energy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, where: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _keep_reading(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self.read()


def gpus_of(device: torch.device) -> tuple[str, ...]:
    """NVML's name of the GPU that a process computes on, whatever CUDA_VISIBLE_DEVICES makes of its number; none for a CPU."""
    return (f"GPU-{torch.cuda.get_device_properties(device).uuid}",) if device.type == "cuda" else ()


def add_up(spent: Sequence[Spent]) -> Energy:
    """The energy of processes that ran side by side, every GPU and every processor counted once.

    Of a counter that several processes read, the first one's reading counts. Where a process computes on a GPU and only one of GPU and
    processor can be read, the other is left out, which `source` says. Where a process has no counter at all, its estimate is added.
    """
    gpus, processors = {}, {}
    for one in reversed(spent):
        gpus |= one.nvml or {}
        processors |= {(one.host, zone): joules for zone, joules in (one.rapl or {}).items()}
    hosts = {host for host, _ in processors}
    estimates = [one.estimate for one in spent if one.host not in hosts and one.nvml is None]
    used = {"nvml": gpus, "rapl": processors, "estimate": estimates}
    source = "+".join(name for name, joules in used.items() if joules)
    on_gpu = [one for one in spent if one.on_gpu]
    missing = _which("GPUs", [one.nvml is None for one in on_gpu])
    missing += _which("processors", [one.nvml is not None and one.host not in hosts for one in spent])
    if missing:
        source += f" (without {' and '.join(missing)})"
    joules = sum(gpus.values()) + sum(processors.values()) + sum(estimates)
    return Energy(joules, max(one.seconds for one in spent), source, measured=not estimates)


def energy_of_ranks(mine: Spent, world: World) -> Energy:
    """What all ranks together spent between the same two moments. Collective."""
    return add_up(world.gather_objects(mine))


def one_after_another(energies: Sequence[Energy]) -> Energy:
    """Of times that followed each other: the legs of an interrupted run, for instance."""
    sources = ", ".join(dict.fromkeys(energy.source for energy in energies))
    measured = all(energy.measured for energy in energies)
    return Energy(sum(energy.joules for energy in energies), sum(energy.seconds for energy in energies), sources, measured)


def carbon_grams(energy: Energy, grams_per_kwh: float = WORLD_GRAMS_PER_KWH) -> float:
    """Grams of CO2 equivalents, of the electricity alone: without the cooling of the room, and the making of the machine."""
    if not 0 <= grams_per_kwh < math.inf:
        raise LoftError(f"--carbon-intensity {grams_per_kwh:g} is impossible: grams of CO2 per kWh are 0 or more")
    return energy.kilowatt_hours * grams_per_kwh


def codecarbon_intensity(country: str, package: str = "codecarbon") -> float:
    """Grams of CO2 per kWh in `country` (ISO 3166, three letters), from the table of Our World in Data that CodeCarbon brings along.

    The file is read and nothing of the package runs, so nothing goes over a network. Raises LoftError where package, table or country
    are missing.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LoftError("a country's carbon intensity comes with codecarbon: pip install codecarbon, or give --carbon-intensity")
    path = Path(found.submodule_search_locations[0], _CODECARBON_TABLE)
    if not path.is_file():
        raise LoftError(f"this codecarbon has no {_CODECARBON_TABLE}: install version 3, or give --carbon-intensity")
    row = read_json(path).get(country.upper())
    grams = row.get("carbon_intensity") if isinstance(row, dict) else None
    if not isinstance(grams, int | float) or not 0 <= grams < math.inf:
        raise LoftError(f"codecarbon knows no carbon intensity of '{country}': give three letters like DEU, or --carbon-intensity")
    return float(grams)


@dataclass(frozen=True)
class InferenceEnergy:
    """Of forward passes, one after another."""

    energy: Energy
    images: int

    @property
    def joules_per_1000_images(self) -> float:
        return 1000 * self.energy.joules / self.images


def grams_per_million(inference: InferenceEnergy, grams_per_kwh: float = WORLD_GRAMS_PER_KWH) -> float:
    """Grams of CO2 equivalents for a million images."""
    return 1e6 * carbon_grams(inference.energy, grams_per_kwh) / inference.images


@torch.no_grad()
def inference_energy(
    networks: Sequence[nn.Module],
    image: tuple[int, int, int],
    batch_size: int,
    repetitions: int,
    meter: Meter,
    stretch_seconds: float = 0.5,
) -> list[InferenceEnergy]:
    """The energy of every network on the same (batch_size, *image) batch, taking turns, so that what else the machine does hits all alike.

    A turn lasts `stretch_seconds`, so that counters move: RAPL's every millisecond, a GPU's a few times, which repetitions even out.
    """
    device = next(networks[0].parameters()).device
    batch = torch.randn(batch_size, *image, device=device).contiguous(memory_format=torch.channels_last)
    turns: list[list[Energy]] = [[] for _ in networks]
    passes = [0 for _ in networks]
    for network in networks:
        _forward(network, batch, 0)  # the first pass chooses algorithms and touches memory
    for _ in range(repetitions):
        for index, network in enumerate(networks):
            begin = meter.read()
            passes[index] += _forward(network, batch, stretch_seconds)
            turns[index].append(add_up([meter.since(begin)]))
    return [InferenceEnergy(one_after_another(turn), count * batch_size) for turn, count in zip(turns, passes, strict=True)]


def _forward(network: nn.Module, batch: torch.Tensor, seconds: float) -> int:
    """Forward passes for so long, one at least; how many they were."""
    begin, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - begin < seconds:
        network(batch)
        synchronise(batch.device)
        passes += 1
    return passes


class _Counter:
    """Joules since it was made. After `span` units the counter starts anew (0: it never does)."""

    def __init__(self, read: Callable[[], int], unit_joules: float, span: int = 0):
        self._read, self._unit, self._span = read, unit_joules, span
        self._last, self._counted = read(), 0

    def joules(self) -> float:
        now = self._read()
        self._counted += max(0, now - self._last + (self._span if now < self._last else 0))
        self._last = now
        return self._unit * self._counted


class _Counters:
    """Counters that are only worth something together: as soon as one cannot be read, there are none."""

    def __init__(self, made: Callable[[], dict[str, _Counter]], failures: tuple[type[Exception], ...]):
        self._failures = failures
        self._counters: dict[str, _Counter] = {}
        with suppress(*failures):
            self._counters = made()

    def joules(self) -> dict[str, float] | None:
        try:
            return {name: counter.joules() for name, counter in self._counters.items()} or None
        except self._failures:
            self._counters = {}
            return None


def _gpu_counters(gpus: Sequence[str], nvml: Any) -> dict[str, _Counter]:
    if not gpus:
        return {}
    nvml.nvmlInit()
    handles = {uuid: nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in gpus}
    return {uuid: _Counter(partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3) for uuid, handle in handles.items()}


def _packages(powercap: Path) -> dict[str, _Counter]:
    """Of the processors. Zones inside a package are part of it, and psys, the whole platform, holds them all: neither is added."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    packages = [zone for zone in zones if read_text(zone / "name", 64).startswith("package")]
    return {zone.name: _Counter(partial(_number, zone / "energy_uj"), 1e-6, _number(zone / "max_energy_range_uj")) for zone in packages}


def _number(path: Path) -> int:
    return int(read_text(path, 32))


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _host() -> str:
    """The running kernel rather than its name: two containers on a node are called differently and read the same counters."""
    try:
        return read_text(_BOOT, 64).strip()
    except (OSError, ValueError):
        return os.uname().nodename


def _cpu_seconds() -> float:
    """Of this process, of its ended child processes, and of those that live: what reads images does so for the whole training."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + _living_seconds(str(os.getpid()))


def _living_seconds(process: str) -> float:
    """CPU seconds of a process's living descendants; 0 where the kernel does not list them."""
    seconds = 0.0
    for listed in Path("/proc", process, "task").glob("*/children"):
        with suppress(OSError, ValueError, IndexError):  # any of them may end at this moment
            for child in listed.read_text().split():
                fields = Path("/proc", child, "stat").read_text().rpartition(")")[2].split()
                ticks = sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime: proc(5)
                seconds += ticks / os.sysconf("SC_CLK_TCK") + _living_seconds(child)
    return seconds


def _difference(begin: Mapping[str, float] | None, end: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if begin is None or end is None else {name: joules - begin[name] for name, joules in end.items()}


def _which(name: str, missing: Sequence[bool]) -> list[str]:
    return [] if not any(missing) else [f"the {name}" if all(missing) else f"some {name}"]
