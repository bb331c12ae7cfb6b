"""What other people's files may hold: a small real run and its tickets, ways to spoil them, and a watch over what a command then does."""

import faulthandler
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from loft_hpc.cli.main import run as loft
from loft_hpc.files import checksum, read_tensors

CPU_SECONDS, WALL_SECONDS = 20, 120
"""Far more than any command here needs; the wall is for what waits without computing, on machines that have other things to do."""
MEMORY_BYTES = 3 << 30
TICKET = "run/tickets/magnitude-l2-0.5"
MASKED = "run/tickets/searched"
SEARCH = ("--method", "edge-popup", "--search-epochs", "1", "--device", "cpu")
SWEPT = "run/sweeps/default/magnitude-l2-0.5-init"
CLUSTER = """name = "cluster"
latency_seconds = 1e-5
bandwidth_bytes_per_second = 125e6
flops_per_second = 1e12
source = "nowhere"
"""


class TookTooLong(BaseException):
    """No Exception, so that no command can take it for a failure of its own."""


@dataclass(frozen=True)
class Told:
    code: int
    out: str
    err: str


@contextmanager
def bounded() -> Iterator[None]:
    """A deadline, and an end to the memory that may be asked for."""

    def late(*_: object) -> None:
        raise TookTooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS))
    handlers = {number: signal.signal(number, late) for _, number, _ in timers}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    faulthandler.dump_traceback_later(2 * WALL_SECONDS, exit=True, file=sys.__stderr__)  # where even the signal is not heard
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(*arguments: str | Path) -> Told:
    """A command in this process, its output as strict as a terminal's."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), bounded():
        code = loft([str(argument) for argument in arguments])
    return Told(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def contents(folder: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """Every entry below a folder by path, with what it is; `without` what lies below these."""
    found = {}
    for path, folders, files in os.walk(folder):
        here = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if str(here / name) not in without]
        for name in folders + files:
            entry = Path(path) / name
            kind = f"link to {os.readlink(entry)}" if entry.is_symlink() else "folder" if entry.is_dir() else "special"
            found[str(here / name)] = hashlib.sha256(entry.read_bytes()).hexdigest() if kind == "special" and entry.is_file() else kind
    return found


def make_original(folder: Path) -> None:
    """A finished run with a ticket and a sweep, a retrained ticket, a run that was interrupted, a cluster, and what belongs to others."""
    tiny = ("--model", "resnet20", "--widen", "0.25", "--batch-size", "512", "--statistics-batches", "1", "--device", "cpu")
    short = ("--epochs", "1", "--batch-size", "512", "--statistics-batches", "1", "--device", "cpu")
    run_ = folder / "run"
    for arguments in (
        ("pretrain", *tiny, "--epochs", "2", "--run", run_),
        ("prune", run_, "--ratio", "0.5"),
        ("retrain", folder / TICKET, *short, "--run", folder / "retrained"),
        ("sweep", run_, "--ratio", "0.5", "--at", "init", *short),
        ("prune", run_, "--ratio", "0.5", *SEARCH, "--name", "searched"),
        ("retrain", folder / MASKED, *short, "--run", folder / "masked"),
    ):
        told = run(*arguments)
        assert told.code == 0, told.err
    shutil.copytree(run_, folder / "interrupted", ignore=shutil.ignore_patterns("tickets", "sweeps", "ledger.json", "model.safetensors"))
    shutil.copytree(run_ / "searches/searched", run_ / "searches/edge-popup-seed0-0.5")
    file = folder / "interrupted/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running", "ended": None, "results": None}))
    (folder / "cluster.toml").write_text(CLUSTER)
    for name in (".hidden/key", "000001/state.safetensors", "scores-000001.safetensors", "thesis.tex"):
        (folder / "others" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "others" / name).write_text("precious\n")


WRITING = {
    "prune": ("run",),
    "resume": ("interrupted",),
    "retrain": ("new",),
    "go on retraining": ("retrained",),
    "export": ("exported.safetensors", "exported.json"),
    "export retrained": ("exported.safetensors", "exported.json"),
    "sweep": ("run",),
    "search": ("run",),
}
"""Commands that write, and where they may."""


def command(name: str, folder: Path) -> list[str | Path]:
    """The arguments of a command over the files in `folder`."""
    fast = ("--latency-batch", "1", "--repetitions", "2", "--device", "cpu")
    short = ("--epochs", "1", "--batch-size", "512", "--statistics-batches", "1", "--device", "cpu")
    return {
        "measure": ["measure", folder / "run", *fast],
        "measure ticket": ["measure", folder / TICKET, *fast],
        "measure retrained": ["measure", folder / "retrained", *fast],
        "distances": ["measure", folder / "run", "--distance-to", "final"],
        "distances by scale": ["measure", folder / "run", "--distance-to", "previous", "--norm", "bn-scale"],
        "distances of retrained": ["measure", folder / "retrained", "--distance-to", "init"],
        "commcost": ["commcost", folder / "run"],
        "cluster": ["commcost", "--cluster", folder / "cluster.toml", "--workers", "2", "--model", "resnet20"],
        "prune": ["prune", folder / "run", "--ratio", "0.3", "--device", "cpu"],
        "resume": ["pretrain", "--run", folder / "interrupted", "--resume"],
        "retrain": ["retrain", folder / TICKET, *short, "--run", folder / "new"],
        "go on retraining": ["retrain", folder / TICKET, "--run", folder / "retrained", "--resume"],
        "sweep": ["sweep", folder / "run", "--ratio", "0.5", "--at", "init", *short],
        "measure masked": ["measure", folder / MASKED, *fast],
        "compare": ["compare", folder / "run", folder / "masked", *fast, "--no-energy", "--no-robustness"],
        "export": ["export", folder / TICKET, "--output", folder / "exported.safetensors", "--device", "cpu"],
        "export retrained": ["export", folder / "retrained", "--output", folder / "exported.safetensors", "--device", "cpu"],
        "search": ["prune", folder / "run", "--ratio", "0.5", *SEARCH],
    }[name]


def asks_for_a_long_training(file: Path) -> bool:
    """Whether a run that is gone on with asks for much more than it did, which it may: such an example shows nothing."""
    try:
        asked = json.loads(file.read_text())["configuration"]
        steps = asked["epochs"] * 1437 / asked["batch_size"]
        return not steps <= 100 or not (asked.get("rounds") or 0) * asked["loft"]["local_iterations"] <= 100
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


FILES = {
    "measure": ("run/run.json", "run/model.safetensors"),
    "measure ticket": (f"{TICKET}/ticket.json", f"{TICKET}/mask.safetensors", f"{TICKET}/model.safetensors"),
    "measure retrained": ("retrained/run.json", "retrained/model.safetensors"),
    "distances": ("run/run.json", "run/metrics.jsonl", "run/snapshots/scores-000004.safetensors", "run/model.safetensors"),
    "distances by scale": ("run/run.json", "run/metrics.jsonl", "run/snapshots/scores-000000.safetensors"),
    "distances of retrained": ("retrained/run.json", "retrained/snapshots/scores-000000.safetensors"),
    "commcost": ("run/run.json", "run/ledger.json"),
    "cluster": ("cluster.toml",),
    "prune": ("run/run.json", "run/model.safetensors", "run/tickets"),
    "resume": (
        "interrupted/run.json", "interrupted/metrics.jsonl", "interrupted/.lock", "interrupted/checkpoints", "interrupted/snapshots",
        "interrupted/checkpoints/000004", "interrupted/checkpoints/000004/progress.json",
        "interrupted/checkpoints/000004/state.safetensors", "interrupted/snapshots/scores-000004.safetensors",
    ),
    "retrain": (f"{TICKET}/ticket.json", f"{TICKET}/mask.safetensors", f"{TICKET}/model.safetensors"),
    "export": (f"{TICKET}/ticket.json", f"{TICKET}/mask.safetensors", f"{TICKET}/model.safetensors"),
    "export retrained": ("retrained/run.json", "retrained/model.safetensors"),
    "go on retraining": ("retrained/run.json", f"{TICKET}/model.safetensors"),
    "sweep": ("run/run.json", "run/tickets", "run/sweeps", "run/sweeps/default/sweep.json", f"{SWEPT}/run.json", f"{SWEPT}/.lock"),
    "measure masked": (f"{MASKED}/ticket.json", f"{MASKED}/mask.safetensors", f"{MASKED}/model.safetensors", f"{MASKED}/scores.safetensors"),
    "compare": ("run/run.json", "run/metrics.jsonl", "masked/run.json", "masked/metrics.jsonl", "masked/model.safetensors"),
    "search": ("run/run.json", "run/searches", "run/searches/edge-popup-seed0-0.5", "run/searches/edge-popup-seed0-0.5/run.json",
               "run/snapshots/epoch-000.safetensors"),
}  # fmt: skip
"""What each command reads, and so what is spoilt for it."""

NUMBERS = (
    0, 1, -1, 2, 3, 7, 2**31, 2**53 + 1, 2**63, 10**12, 10**18, 10**400, 10**4000, -(10**18), 0.5, 1.5, 1e-300, 1e300, float("nan"),
    float("inf"), -float("inf"),
)  # fmt: skip
WORDS = (
    "", "0", "-1", "1ep", "9" * 5000, ",".join(["9" * 5000] * 2), "../../others", "/etc/passwd", "..", ".", "a/b", "\0", "\ud800",
    "\x1b]0;owned\x07\x1b[2J", "two\nlines", "\r", "$\\frac$", "{0}", "%s", "²", "٣", "imagefolder", "cifar10", "synthetic", "cuda",
    "gpipe", "data-parallel", "loft", "alltoall", "bfloat16", "step", "carry", "imagenet", "init", "pretrain", "retrain", "done",
)  # fmt: skip
NAMES = (*(word for word in WORDS if word != "\ud800"), "l2/layer9.9")
"""Of tensors, which are UTF-8."""


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


hostile = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from((None, True, False, [], {}, [1], [[1]], {"a": 1}, [1] * 10_000, nested(50), nested(400), nested(900))),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


def spoil(draw: Any, path: Path) -> None:
    """Do one thing to a file or folder that its owner would not have done."""
    if not path.is_file() or draw(st.integers(0, 9)) == 0:
        replace_entry(draw, path)
    elif draw(st.integers(0, 4)) == 0:
        spoil_bytes(draw, path)
    elif path.suffix == ".json":
        spoil_json(draw, path)
    elif path.suffix == ".jsonl":
        spoil_lines(draw, path)
    elif path.suffix == ".toml":
        spoil_toml(draw, path)
    elif path.suffix == ".safetensors":
        spoil_tensors(draw, path)
    else:
        spoil_bytes(draw, path)


def replace_entry(draw: Any, path: Path) -> None:
    """Something else in its place: nothing, a folder, a pipe, a device, a link to others' files."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    others = next(parent for parent in path.parents if (parent / "others").is_dir()) / "others"
    kind = draw(st.sampled_from(("nothing", "folder", "file", "pipe", "link to file", "link to folder", "device", "loop", "dangling")))
    targets = {
        "link to file": others / "thesis.tex",
        "link to folder": others,
        "device": "/dev/zero",
        "loop": path,
        "dangling": others / "new",
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("{}")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in targets:
        path.symlink_to(targets[kind])


def spoil_bytes(draw: Any, path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = draw(st.integers(0, min(len(content), 4000)))
    kind = draw(st.sampled_from(("flip", "cut", "insert")))
    if kind == "flip" and place < len(content):
        content[place] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    else:
        content[place:place] = draw(st.one_of(st.binary(max_size=20), st.sampled_from((b"[" * 100_000, b"9" * 100_000, b"\0" * 10_000))))
    path.write_bytes(content)


def places(value: Any, here: tuple = ()) -> Iterator[tuple]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*here, key)
        yield from places(inner, (*here, key))


def spoil_value(draw: Any, fields: Any) -> None:
    """One entry of a JSON value replaced, removed or added."""
    *way, last = draw(st.sampled_from(list(places(fields)) or [("new",)]))
    for key in way:
        fields = fields[key]
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    if kind == "remove":
        del fields[last]
    elif kind == "add" and isinstance(fields, dict):
        fields[draw(st.sampled_from(WORDS))] = draw(hostile)
    else:
        fields[last] = draw(hostile)


def spoil_json(draw: Any, path: Path) -> None:
    fields = json.loads(path.read_text())
    spoil_value(draw, fields)
    path.write_text(written(fields))


def spoil_lines(draw: Any, path: Path) -> None:
    lines = path.read_text().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    fields = json.loads(lines[place])
    spoil_value(draw, fields)
    lines[place] = written(fields)
    path.write_text("\n".join(lines) + "\n" * draw(st.integers(0, 1)))


def written(fields: Any) -> str:
    """As JSON, however deep."""
    limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(fields)
    finally:
        sys.setrecursionlimit(limits[0])
        sys.set_int_max_str_digits(limits[1])


def spoil_toml(draw: Any, path: Path) -> None:
    lines = path.read_text().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    value = draw(
        st.one_of(hostile.map(in_toml), st.sampled_from(("[" * 50_000, "a." * 20_000, "1979-05-27", "0x" + "f" * 5000, "inf", "-nan")))
    )
    lines[place] = f"{lines[place].split(' = ')[0] if draw(st.integers(0, 4)) else 'other'} = {value}"
    path.write_text("\n".join(lines), errors="surrogatepass")


def in_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, float) else written(value).replace("\\ud800", "\\uD800")


def spoil_tensors(draw: Any, path: Path) -> None:
    """Another tensor than there was, with the checksum that belongs to it."""
    tensors = read_tensors(path)
    name = draw(st.sampled_from(sorted(tensors) or ["new"]))
    tensor = tensors.get(name, torch.zeros(1))
    changed = draw(
        st.sampled_from(
            (
                None,
                tensor.double(),
                tensor.half(),
                tensor.bool(),
                tensor.to(torch.int64),
                tensor.to(torch.uint8),
                tensor.to(torch.bfloat16),
                tensor.to(torch.complex64),
                tensor.float().to(torch.float8_e4m3fn),
                tensor.flatten()[:0],
                tensor.flatten()[:1],
                tensor.flatten(),
                tensor.unsqueeze(0),
                torch.tensor(1.0),
                torch.full_like(tensor.float(), float("nan")),
                torch.full_like(tensor.float(), float("inf")),
                torch.full_like(tensor.float(), -1e30),
                torch.zeros(2_000_000, dtype=torch.uint8),
            )
        )
    )
    if changed is None:
        del tensors[name]
    else:
        tensors[name if draw(st.integers(0, 3)) else draw(st.sampled_from(NAMES))] = changed.clone()
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(ready, path, metadata={"sha256": checksum(ready)})  # ours would not write what is not finite
