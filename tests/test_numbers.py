"""Numbers: what is not finite is refused wherever it comes from, and every numeric option of every command has its bounds."""

import json
import math
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loft_hpc.cli.main import COMMANDS, loft, run
from loft_hpc.cli.pruning import emptied_line
from loft_hpc.comm.ledger import Ledger
from loft_hpc.errors import LoftError
from loft_hpc.files import checksum, read_json, read_tensors, write_json, write_tensors
from loft_hpc.filterwise.emergence import Emergence, Stopping
from loft_hpc.jobs.agreement import refuse_disagreement
from loft_hpc.jobs.prune import ticket_names
from loft_hpc.jsontext import finite_or_none, from_json_text, to_json_text
from loft_hpc.models.architecture import architecture
from loft_hpc.models.groups import filter_groups
from loft_hpc.models.scores import filter_scores, removed_text
from loft_hpc.runs.log import EventLog
from loft_hpc.tickets.block_scores import removable
from loft_hpc.tickets.counts import largest, largest_of_all
from loft_hpc.tickets.finders.random import random_filters
from loft_hpc.tickets.masks import FilterMask, WeightMask, weight_shapes
from loft_hpc.tickets.pruning import Pruning, all_options
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.strategy import summed

from tiny import initial_state, tiny

STRANGE = (math.nan, math.inf, -math.inf)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
)


def with_one(strange: float):
    """JSON values that hold this number somewhere."""
    leaf = st.just(strange)
    return st.recursive(
        leaf,
        lambda inner: (
            st.tuples(st.lists(anything, max_size=2), inner).map(lambda pair: [*pair[0], pair[1]])
            | st.tuples(st.dictionaries(st.text(max_size=3), anything, max_size=2), inner).map(lambda pair: pair[0] | {"in here": pair[1]})
        ),
        max_leaves=4,
    )


@given(st.sampled_from(STRANGE).flatmap(with_one))
def test_no_json_is_written_or_read_with_what_is_not_finite(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "run.json"
    for write in (to_json_text, lambda value: write_json(path, {"results": value}), EventLog(path.with_name("log")).append):
        with pytest.raises(LoftError, match=r"nan|inf"):
            write({"results": value})
    assert not path.exists() and not path.with_name("log").exists()
    text = json.dumps({"results": value})  # what others, and earlier versions, wrote
    path.write_text(text)
    with pytest.raises(LoftError, match=f"{path.name} cannot be read .*JSON does not know"):
        read_json(path)
    log = EventLog(path.with_name("log"))
    path.with_name("log").write_text('{"event": "eval", "step": 1}\n' + json.dumps({"step": 2, "loss": value}) + '\n{"step": 3}\n')
    assert [event["step"] for _, event in log.lines()] == [1, 3]


@given(anything)
def test_all_other_json_comes_back(value):
    assert from_json_text(to_json_text(value)) == value


def test_a_number_out_of_bounds_is_none():
    with pytest.raises(ValueError, match="1e999"):
        from_json_text('{"lr": 1e999}')
    assert [finite_or_none(value) for value in (*STRANGE, 0.5, 3, None)] == [None, None, None, 0.5, 3, None]


@given(st.sampled_from(STRANGE), st.integers(0, 10**6))
def test_tensors_that_are_not_finite_are_neither_written_nor_read(tmp_path_factory, strange, place):
    path, tensors = tmp_path_factory.mktemp("tensors") / "model.safetensors", initial_state(tiny())
    name = sorted(tensors)[place % len(tensors)]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[place % tensors[name].numel()] = strange
    with pytest.raises(LoftError, match=f"{name} that is not finite"):
        write_tensors(path, tensors)
    assert not path.exists()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"sha256": checksum(tensors)})
    with pytest.raises(LoftError, match=f"{path.name} holds a {name} that is not finite"):
        read_tensors(path)


@given(st.sampled_from(STRANGE), st.integers(0, 39))
def test_scores_that_are_not_finite_rank_nothing(strange, place):
    scores = np.linspace(1, 2, 40)
    scores[place] = strange
    for rank in (lambda: largest(scores, 3), lambda: largest_of_all({"a": scores[:20], "b": scores[20:]}, 0.5, 0.1, 1, "filters")):
        with pytest.raises(LoftError, match="not finite"):
            rank()
    found, watching = filter_scores(initial_state(tiny()), filter_groups(tiny())), Emergence(Stopping())
    watching.see(found)
    found["l2/layer2.1"][place % 12] = strange
    with pytest.raises(LoftError, match="not finite"):
        watching.see(found)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.integers(0, 8), st.sampled_from(STRANGE))
def test_what_an_update_leaves_is_looked_at_as_its_loss_is(losses, place, strange):
    held = torch.randn(100)
    total, wrong = summed(torch.tensor(losses), 5, held, torch.empty(0))
    assert wrong is None and total == pytest.approx(sum(losses), abs=1e-4)
    if place < len(losses):
        losses[place] = strange
        assert summed(torch.tensor(losses), 5, held)[1] == 5 + place + 1
    else:
        held[place] = strange
        assert summed(torch.tensor(losses), 5, torch.zeros(3), held)[1] == 5 + len(losses)


# -- trainings and searches that get too large ----------------------------------------------------------------------------

QUICK = ("--model", "resnet20", "--epochs", "1", "--batch-size", "360")  # of digits: three steps


def refused(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a command that fails."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in line
    return code, line


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one epoch on one rank."""
    path = tmp_path_factory.mktemp("numbers") / "run"
    assert run(["pretrain", *QUICK, "--strategy", "data-parallel", "--run", str(path)]) == 0
    return path


@pytest.mark.parametrize(("strategy", "lr"), [("loft", "1e37"), ("data-parallel", "1e30"), ("gpipe", "3e38")])
def test_a_training_that_gets_too_large_fails(capsys, tmp_path, strategy, lr):
    """At 1e37 the weights stay finite, and overflow in the next forward pass: the only one is that of the evaluation."""
    path = tmp_path / "run"
    steps = ("--rounds", "1", "--local-iterations", "1", "--model", "resnet20") if strategy == "loft" else QUICK
    code, line = refused(capsys, "pretrain", *steps, "--strategy", strategy, "--lr", lr, "--run", path)
    description = read_json(path / "run.json")
    assert code == 1 and description["status"] == "failed" and line == f"loft: {description['failure']}"
    assert "not finite" in line and "lower --lr" in line and not (path / "model.safetensors").exists()


def test_searches_and_retrainings_that_get_too_large_fail(capsys, trained):
    for method, option in (("gem-miner", "--regulariser"), ("imp", "--search-lr")):
        code, line = refused(capsys, "prune", trained, "--method", method, "--ratio", "0.5", option, "3e38")
        (search,) = (path for path in (trained / "searches").rglob("run.json") if method in str(path))
        assert code == 1 and "not finite" in line and read_json(search)["status"] == "failed"
    assert run(["prune", str(trained), "--ratio", "0.5"]) == 0
    ticket, path = trained / "tickets" / "magnitude-l2-0.5", trained.parent / "retrained"
    code, line = refused(capsys, "retrain", ticket, "--lr", "1e37", "--epochs", "1", "--batch-size", "1437", "--run", path)
    assert code == 1 and "not finite" in line and read_json(path / "run.json")["status"] == "failed"
    assert not [path for path in (trained / "tickets").iterdir() if path != ticket]


def test_weights_that_overflow_make_no_ticket(capsys, trained, tmp_path):
    """They are finite in the file."""
    other = tmp_path / "large"
    other.mkdir()
    (other / "run.json").write_bytes((trained / "run.json").read_bytes())
    model = read_tensors(trained / "model.safetensors")
    write_tensors(other / "model.safetensors", {name: tensor * 1e37 if tensor.dim() == 4 else tensor for name, tensor in model.items()})
    for command in (
        ("prune", other, "--ratio", "0.5"),
        ("measure", other),
        ("prune", other, "--method", "layers", "--criterion", "kl", "--ratio", "0.5"),
    ):
        code, line = refused(capsys, *command)
        assert code == 1 and "finite" in line
    assert not (other / "tickets").exists()


class _Ranks:
    """What all ranks of a world say, one after the other."""

    ledger = Ledger()

    def __init__(self, *said: dict):
        self._said = said

    def gather_objects(self, mine: dict) -> list[dict]:
        return list(self._said)


def test_nan_agrees_with_nan_alone():
    refuse_disagreement({}, _Ranks({"--widen": math.nan}, {"--widen": math.nan}))
    for one, other in ((math.nan, 1.0), (1.0, math.nan), (1.0, 2.0)):
        with pytest.raises(LoftError, match="start all ranks alike"):
            refuse_disagreement({}, _Ranks({"--widen": one}, {"--widen": other}))


# -- every numeric option -------------------------------------------------------------------------------------------------

HUGE = {int: str(10**400), float: "1e300"}
ZERO_IS_FINE = {
    "lr", "momentum", "weight_decay", "decay", "loader_workers", "stall_seconds", "seed", "retrain_seed", "tolerance", "floor", "regulariser",
    "carbon_intensity", "xi", "epsilon", "measure ratio",
}  # fmt: skip
HUGE_IS_FINE = {"kappa", "eta"}
"""In float64; what they lead to is found out where it happens."""


def kind_of(parameter: click.Parameter) -> type | None:
    if isinstance(parameter.type, click.types.IntParamType):
        return int
    return float if isinstance(parameter.type, click.types.FloatParamType) else None


def cases() -> list[tuple[str, str, str, str]]:
    """(command, option, its value, method)"""
    found = []
    for name in COMMANDS:
        command = loft.get_command(click.Context(loft), name)
        for parameter in command.params:
            kind = kind_of(parameter)
            if kind is None or not isinstance(parameter, click.Option):
                continue
            values = ["nan", "inf", "-inf", "-1", "-0.5"]
            values += ["0"] * (not {parameter.name, f"{name} {parameter.name}"} & ZERO_IS_FINE) + [HUGE[kind]] * (
                parameter.name not in HUGE_IS_FINE
            )
            owners = [finder.name for finder, _ in all_options().get(parameter.name, [])] if name in ("prune", "sweep") else []
            found += [(name, parameter.opts[0], value, method) for value in values for method in owners or [""]]
    return found


def arguments_of(name: str, trained: Path, method: str) -> list[str]:
    if name == "pretrain":
        return ["--dry-run"]
    chosen = ["--method", method] if method else []
    path = {"retrain": trained / "tickets" / "magnitude-l2-0.5", "check": trained / "tickets" / "magnitude-l2-0.5"}.get(name, trained)
    return [*([] if name in ("theory", "commcost", "doctor") else [str(path)]), *chosen]


def test_every_numeric_option_of_every_command_has_bounds(capsys, trained, monkeypatch, tmp_path):
    """Exit code 2 and one line, before anything is computed or written."""
    monkeypatch.chdir(tmp_path)
    before, wrong, tried = sorted(trained.rglob("*")), [], cases()
    for name, option, value, method in tried:
        own = {
            "--micro-batches": ("--strategy", "gpipe"),
            "--stability": (),
            "--tolerance": ("--stop-when-stable",),
            "--patience": ("--stop-when-stable",),
        }
        extra = (
            own.get(option, ()) if name == "pretrain" else ("--distance-to", "final") if (name, option) == ("measure", "--ratio") else ()
        )
        code = run([name, *arguments_of(name, trained, method), *extra, f"{option}={value}"])
        out, err = capsys.readouterr()
        if code != 2 or len(err.splitlines()) != 1 or out:
            wrong.append(f"{name} {method} {option} {value}: {code} {err.splitlines()[-1:]} {out[:80]}")
    assert not wrong, "\n".join(wrong)
    assert len(tried) > 300 and sorted(trained.rglob("*")) == before and not list(tmp_path.iterdir())


def test_batches_that_no_training_takes_are_refused_by_estimates_too(capsys, trained, tmp_path, monkeypatch):
    """The same sentence whether it is planned or started."""
    monkeypatch.chdir(tmp_path)
    for strategy in ("loft", "data-parallel", "gpipe"):
        for batch in (1, 2, 3, 1438, 10**8):
            options = ("pretrain", "--model", "resnet20", "--strategy", strategy, "--batch-size", batch)
            planned = run([*map(str, options), "--dry-run"])
            told = capsys.readouterr().err
            if strategy != "gpipe" and batch in (2, 3):
                assert planned == 0, told
                continue
            assert (
                planned == 2 and len(told.splitlines()) == 1 and refused(capsys, *options, "--run", tmp_path / "none") == (2, told.strip())
            )
    for workers in (2, 3, 5, 16):
        assert (
            run(["pretrain", "--dry-run", "--strategy", "data-parallel", "--workers", str(workers), "--batch-size", str(2 * workers - 1)])
            == 2
        )
        assert (
            run(["pretrain", "--dry-run", "--strategy", "data-parallel", "--workers", str(workers), "--batch-size", str(2 * workers)]) == 0
        )
    capsys.readouterr()
    case = ("--dataset", "digits", "--batch-size", "1", "--workers", "2", "--strategy", "loft", "--strategy", "data-parallel")
    assert run(["commcost", *case, "--cluster", "ethernet-1g", "--format", "json"]) == 0
    assert capsys.readouterr().out.count("and normalisation needs 2") == 2


def test_the_latency_of_one_image(capsys, trained):
    assert run(["measure", str(trained), "--latency-batch", "1", "--repetitions", "2", "--energy", "--format", "json"]) == 0
    (measured,) = json.loads(capsys.readouterr().out)["measured"]
    assert measured["memory"]["training_bytes"] is None and measured["memory"]["inference_activations_bytes"] > 0
    assert measured["latency"]["median_seconds"] > 0
    assert run(["measure", str(trained), "--latency-batch", "1", "--repetitions", "2"]) == 0
    assert "BatchNorm needs two images" in capsys.readouterr().out


# -- what was removed, and what is left of a layer -------------------------------------------------------------------------


@given(st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_what_a_mask_removes_is_counted_in_the_mask(ratio, seed):
    groups, draw = filter_groups(tiny()), np.random.default_rng(seed)
    chosen = random_filters(groups, min(ratio, 0.9), seed)
    removed = FilterMask(tiny(), chosen).removed(groups)
    assert (removed.units, removed.of) == (
        sum(group.width - len(chosen[group.name]) for group in groups),
        sum(group.width for group in groups),
    )
    weights = {name: torch.from_numpy((draw.random(shape) > ratio).astype(np.uint8)) for name, shape in weight_shapes(tiny()).items()}
    mask = WeightMask(tiny(), weights)
    assert mask.removed(groups).units == sum(int((kept == 0).sum()) for kept in weights.values())
    assert mask.emptied() == [name for name, kept in weights.items() if not kept.any()]


@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=4, unique=True), st.sampled_from(["resnet20", "resnet32", "preresnet18"]))
def test_layer_tickets_are_named_by_what_they_remove(ratios, model):
    dense = architecture(model, 10)
    prunings = [Pruning(ratio, "layers") for ratio in ratios]
    blocks = len(removable(dense))
    counts = [math.floor(round(ratio * blocks, 9)) for ratio in ratios]
    if len(set(counts)) < len(counts):
        with pytest.raises(LoftError, match="come to the same ticket, layers-grasp-"):
            ticket_names(prunings, "all", "init", dense)
    else:
        assert ticket_names(prunings, "all", "init", dense) == [f"layers-grasp-{count}of{blocks}" for count in counts]


EMPTIES = ("--scope", "global", "--unit", "weights")


@pytest.mark.parametrize(
    "options",
    [("--scope", "global"), EMPTIES, ("--method", "random", "--unit", "weights"),
     ("--method", "layers", "--criterion", "l1"), ("--method", "edge-popup", "--scope", "global", "--search-epochs", "1"),
     ("--method", "gem-miner", "--search-epochs", "1"), ("--method", "imp", "--level-ratio", "0.99", "--search-epochs", "1"),
     ("--method", "bn-scale", "--floor", "0")],
)  # fmt: skip
def test_a_ticket_says_what_it_removes_and_which_layers_it_empties(capsys, trained, options):
    """For people, in JSON and in its own file alike, whatever found it."""
    ratio = 0.6 if "weights" not in options and options[1] in ("global", "layers", "bn-scale") else 0.98
    assert run(["prune", str(trained), *options, "--ratio", str(ratio), "--format", "json"]) == 0
    (ticket,) = json.loads(capsys.readouterr().out)["tickets"]
    mask, description = Ticket.read(Path(ticket["path"])).mask, read_json(Path(ticket["path"]) / "ticket.json")
    removed = mask.removed(filter_groups(mask.dense))
    expected = {
        "pruning_ratio": removed.share,
        "removed_units": removed.units,
        "prunable_units": removed.of,
        "emptied_layers": mask.emptied(),
    }
    assert expected.items() <= ticket.items() and expected.items() <= description.items()
    assert ticket["ratio"] == ticket["pruning_ratio_asked"] == description["ratio"] == ratio and abs(removed.share - ratio) < 0.2
    shutil.rmtree(ticket["path"])
    if options != EMPTIES:
        return
    assert mask.emptied() and run(["prune", str(trained), *options, "--ratio", str(ratio)]) == 0
    out = capsys.readouterr().out
    assert removed_text(removed.share, ratio) in out and emptied_line(ticket["path"], mask.emptied()) in out.splitlines()
    shutil.rmtree(ticket["path"])


def test_what_was_asked_is_told_where_it_is_not_what_was_removed():
    assert [removed_text(*shares) for shares in ((0.8, 0.8), (0.79999, 0.8), (3 / 7, 0.5))] == ["80 %", "80 %", "42.86 % (asked 50 %)"]
