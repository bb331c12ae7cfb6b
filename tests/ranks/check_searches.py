"""Searches for tickets over real ranks: trained scores, masked trainings, and the finders as commands."""

import json
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from loft_hpc.cli.main import run
from loft_hpc.comm.alone import Alone
from loft_hpc.data.embedded import digits
from loft_hpc.data.order import Order
from loft_hpc.errors import LoftError
from loft_hpc.models.groups import parameters_of
from loft_hpc.models.resnet import build
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.run import Run
from loft_hpc.tickets.counts import kept_of_each
from loft_hpc.tickets.masks import WeightMask, weight_shapes
from loft_hpc.tickets.score_search import ScoreSearch, SearchRule, freezings, searched_tensors, signed_constants
from loft_hpc.tickets.source import Workshop
from loft_hpc.tickets.ticket import Ticket
from loft_hpc.training.dataparallel import DataParallel
from loft_hpc.training.settings import Computation, Optimisation

from tiny import CPU, initial_state, tiny

SIZES = (2,)
PARTS = 4
KEEP = 200
TOTAL = sum(shape.numel() for shape in weight_shapes(tiny()).values())


def shop(world, steps=24, parts=PARTS) -> Workshop:
    data = digits(CPU)
    order = Order("split", data.info.train_images, 360, 3, world.rank, world.size)  # three steps an epoch
    return Workshop(tiny(), data, order, steps, Optimisation(lr=30.0, weight_decay=0), parts, 1, Computation(), CPU, world)


def search(world, rule=None, **details) -> ScoreSearch:
    rule = rule or SearchRule(KEEP, 1e-4, freezings(8, 1, 3, TOTAL, KEEP))
    return ScoreSearch(shop(world, **details), signed_constants(initial_state(tiny())), rule)


def masked(world, parts=PARTS) -> tuple[DataParallel, dict[str, torch.Tensor]]:
    order = shop(world).order
    mask = {
        name: (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.uint8)
        for name, shape in weight_shapes(tiny()).items()
    }
    training = DataParallel(
        tiny(),
        None,
        initial_state(tiny()),
        Optimisation(lr=0.1, weight_decay=0.01),
        digits(CPU),
        order,
        12,
        Computation(),
        CPU,
        world,
        mask,
        parts,
    )
    return training, mask


def finish(training) -> None:
    step = 0
    while step < training.total_steps:
        step = training.advance().step


def close(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


def alike(world, tensors) -> None:
    mine = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    assert all(theirs == mine for theirs in MPI.COMM_WORLD.allgather(mine))


def test_freezing_never_revives_and_ends_at_the_exact_count(world):
    training = search(world)
    frozen, step, counts = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in weight_shapes(tiny()).items()}, 0, []
    while step < training.total_steps:
        step = training.advance().step
        tensors, _ = training.checkpoint()
        alive = searched_tensors(tiny(), tensors["alive"])
        scores, momentum = (searched_tensors(tiny(), tensors[name]) for name in ("scores", "momentum"))
        effective = training.full_state()
        for name in frozen:
            off = alive[name] == 0
            assert not (frozen[name] & ~off).any(), "a frozen weight came back"
            assert not scores[name][off].any() and not momentum[name][off].any() and not effective[name][off].any()
            assert scores[name].min() >= 0 and scores[name].max() <= 1
            frozen[name] = off
        counts.append(sum(int(mask.sum()) for mask in alive.values()))
    planned = [count for _, count in freezings(8, 1, 3, TOTAL, KEEP)]
    assert counts[-1] == KEEP and set(counts) <= {TOTAL, *planned, KEEP}
    alike(world, tensors)
    weights = signed_constants(initial_state(tiny()))
    for name, tensor in training.full_state().items():
        assert torch.equal(tensor[tensor != 0], weights[name][tensor != 0])  # no weight was trained


def test_a_search_goes_on_bitwise(world):
    whole, begun = search(world), search(world)
    finish(whole)
    while (step := begun.advance(10).step) < 10:
        pass
    tensors, progress = begun.checkpoint()
    other = search(world)
    other.restore(Checkpoint(step, tensors, [], progress))
    finish(other)
    assert all(torch.equal(tensor, other.checkpoint()[0][name]) for name, tensor in whole.checkpoint()[0].items())
    with pytest.raises(LoftError, match="another network"):
        search(world).restore(Checkpoint(step, tensors | {"scores": tensors["scores"][1:]}, [], progress))


def test_scores_do_not_depend_on_the_number_of_ranks(world):
    """Batches of four parts: as one rank has them, up to the order of summation."""
    together, alone = search(world, steps=3), search(Alone(world), steps=3)
    for training in (together, alone):
        finish(training)
    close({"scores": together.checkpoint()[0]["scores"]}, {"scores": alone.checkpoint()[0]["scores"]})


def test_masked_training_neither_revives_nor_depends_on_the_number_of_ranks(world):
    together, mask = masked(world)
    alone, _ = masked(Alone(world))
    for training in (together, alone):
        training.advance(2)  # rounding grows a hundredfold a step
    close(together.full_state(), alone.full_state())
    finish(together)
    state, (tensors, _) = together.full_state(), together.checkpoint()
    for name, kept in mask.items():
        assert not state[name][kept == 0].any() and not tensors[f"momentum/{name}"][kept == 0].any()
        assert state[name][kept == 1].all() and not torch.equal(state[name], initial_state(tiny())[name] * kept)
    alike(world, state)


def test_parts_must_be_as_many_as_ranks(world):
    if world.size > 1:
        with pytest.raises(LoftError, match="--batch-parts 1"):
            search(world, parts=1)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_edge_popup_turns_on_as_many_weights_as_the_ticket_has(world, scope):
    counts = kept_of_each({name: shape.numel() for name, shape in weight_shapes(tiny()).items()}, 1 - KEEP / TOTAL, "weights")
    training = search(world, SearchRule(KEEP, top={} if scope == "global" else counts), steps=6)
    for _ in range(3):
        training.advance(training._step + 2)
        on = {name: int((training.full_state()[name] != 0).sum()) for name in weight_shapes(tiny())}
        if scope == "global":
            assert sum(on.values()) == KEEP
        else:
            assert on == counts


@pytest.fixture(scope="session")
def source(world, tmp_path_factory) -> Path:
    folder: Path = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("searches") if world.rank == 0 else None)
    options = ("--model", "resnet20", "--widen", "0.25", "--epochs", "2", "--batch-size", "96", "--statistics-batches", "2", "--lr", "0.1")
    assert run(["pretrain", "--strategy", "data-parallel", *options, "--run", str(folder / "run")]) == 0
    world.barrier()
    return folder / "run"


METHODS = {
    "magnitude": ("--unit", "weights", "--scope", "global"),
    "random": ("--unit", "weights", "--profile", "smart-ratio"),
    "bn-scale": (),
    "early-bird": ("--patience", "1", "--tolerance", "1"),
    "layers": ("--criterion", "snip"),
    "gem-miner": ("--freeze-every", "1"),
    "edge-popup": ("--search-epochs", "1"),
    "imp": ("--level-ratio", "0.4", "--rewind-to", "1ep"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_finder_makes_tickets_that_retrain(world, source, method, capfd):
    command = ["prune", str(source), "--method", method, *METHODS[method], "--ratio", "0.5", "--name", f"{method}-test"]
    assert run(command) == 0, capfd.readouterr().err
    world.barrier()
    path = source / "tickets" / f"{method}-test"
    ticket = Ticket.read(path)
    if isinstance(ticket.mask, WeightMask):
        assert ticket.mask.count == ticket.mask.total - ticket.mask.total // 2
    assert (ticket.cost.samples > 0 and ticket.cost.epochs > 0) or method in ("random", "magnitude", "bn-scale")
    assert run(command) == 1 and "exists already" in (capfd.readouterr().err if world.rank == 0 else "exists already")
    assert run(["retrain", str(path), "--epochs", "1", "--run", str(source.with_name(method))]) == 0
    world.barrier()
    retrained = Run.open(source.with_name(method))
    assert retrained.dense_architecture == Run.open(source).architecture and retrained.architecture == ticket.architecture
    for name, kept in (ticket.mask.weights or {}).items():
        assert not retrained.read_model()[name][kept == 0].any()
    joules = retrained.description["legs"][0]["energy"]
    assert joules["joules"] > 0 and joules["source"]


def test_levels_of_imp_are_nested_rewound_and_trained_once(world, source):
    command = ["prune", str(source), "--method", "imp", "--level-ratio", "0.4"]
    assert run([*command, "--ratio", "0.5", "--ratio", "0.8"]) == 0
    world.barrier()
    levels = [Run.open(path) for path in sorted((source / "searches" / "imp-init-by0.4").iterdir())]
    assert [level.description["search"]["level"] for level in levels] == [1, 2, 3]  # 0.6, 0.36, 0.216
    half, fifth = (Ticket.read(source / "tickets" / f"imp-init-by0.4-{ratio}").mask for ratio in (0.5, 0.8))
    initial = parameters_of(Run.open(source).snapshots.read("epoch-000"))
    tickets = {0.5: half, 0.8: fifth}
    for ratio, mask in tickets.items():
        state = Ticket.read(source / "tickets" / f"imp-init-by0.4-{ratio}").state
        assert all(torch.equal(state[name], torch.where(kept.bool(), initial[name], 0)) for name, kept in mask.kept.items())
    before = [level.description["ended"] for level in levels]
    kept = {name: state != 0 for name, state in levels[0].read_model().items()}
    for level in levels[1:]:
        for name in half.kept:
            now = level.read_model()[name] != 0
            assert not (now & ~kept[name]).any(), "a level revived what the one before removed"
            kept[name] = now
    assert run([*command, "--ratio", "0.7"]) == 0
    world.barrier()
    assert [Run.open(level.path).description["ended"] for level in levels] == before


def test_a_check_ends_in_a_verdict_and_is_not_made_twice(world, source, capfd):
    assert run(["prune", str(source), "--ratio", "0.7", "--name", "checked"]) == 0
    world.barrier()
    path = source / "tickets" / "checked"
    command = ["check", str(path), "--epochs", "1", "--seeds", "2", "--format", "json"]
    capfd.readouterr()
    assert run(command) == 0
    world.barrier()
    made = sorted((path / "checks" / "default").iterdir())
    assert len(made) == 12 and all(Run.open(folder).description["world_size"] == 1 for folder in made)
    said = capfd.readouterr().out
    ended = [Run.open(folder).description["ended"] for folder in made]
    assert run(command) == 0
    world.barrier()
    again = capfd.readouterr().out
    assert [Run.open(folder).description["ended"] for folder in made] == ended
    if world.rank == 0:
        fields = json.loads(said[said.index("{") :])
        assert fields == json.loads(again[again.index("{") :])
        assert [variant["variant"] for variant in fields["variants"]] == [
            "dense",
            "ticket",
            "shuffled",
            "reinitialised",
            "inverted",
            "random",
        ]
        assert fields["verdict"] in ("winning", "better than random", "no better than random", "inconclusive")
        states = {folder.name: Run.open(folder).read_model() for folder in made}
        assert {folder.name for folder in made} >= {"ticket-seed0", "random-seed1"} and len(
            {len(state["fc.bias"]) for state in states.values()}
        ) == 1
    assert run([*command, "--lr", "0.5"]) == 1


def test_comparisons(world, source, tmp_path, capfd):
    assert run(["prune", str(source), "--ratio", "0.5", "--name", "compared"]) == 0
    world.barrier()
    runs = [source.with_name(f"compared-{seed}") for seed in (1, 2)]
    for seed, path in enumerate(runs):
        assert run(["retrain", str(source / "tickets" / "compared"), "--epochs", "1", "--seed", str(seed), "--run", str(path)]) == 0
    world.barrier()
    plot = source.with_name("compared.png")
    capfd.readouterr()
    assert (
        run(
            [
                "compare",
                str(source),
                *map(str, runs),
                "--repetitions",
                "2",
                "--robustness",
                "--severity",
                "1",
                "--format",
                "json",
                "--plot",
                str(plot),
            ]
        )
        == 0
    )
    world.barrier()
    if world.rank == 0:
        out = capfd.readouterr().out
        dense, ticket = json.loads(out[out.index("{") :])["tickets"]
        assert (dense["kind"], ticket["kind"], ticket["runs"], dense["density"]) == ("dense", "filter", 2, 1)
        assert ticket["accuracy_mean"] == pytest.approx(sum(Run.open(path).accuracy for path in runs) / 2)
        assert ticket["finding_samples"] == dense["finding_samples"] == 2 * (1437 // 96) * 96
        assert ticket["energy_measured"] in (True, False) and 0 <= ticket["accuracy_pgd"] <= 1 and plot.stat().st_size > 5000
    assert run(["compare", str(source / "tickets" / "compared"), "--repetitions", "2", "--no-energy", "--no-robustness"]) == 0
    world.barrier()
    if world.rank == 0:
        assert "retrained from the trained weights, 1 epoch at" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--method", "loft"), 1, "trained data-parallel, not filter-wise"),
        (("--method", "gem-miner", "--at", "final"), 2, "leave --at away"),
        (("--method", "layers", "--ratio", "0.01"), 1, "is none: give --ratio"),
        (("--method", "imp", "--rewind-to", "7it"), 1, "to rewind to"),
        (("--method", "imp", "--rewind-to", "1ep", "--search-epochs", "1"), 1, "leaves nothing"),
        (("--method", "imp", "--ratio", "0.000001"), 1, "removes none"),
        (("--method", "early-bird"), 1, "are not stable"),
        (("--method", "bn-scale", "--at", "init"), 1, "all BatchNorm scales are alike"),
        (("--unit", "weights", "--ratio", "0.99999", "--scope", "global"), 1, "would vanish"),
        (("--method", "random", "--criterion", "l2"), 2, "belongs to --method"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(world, source, options, code, says, capfd):
    before = sorted((source / "tickets").glob("*")) if (source / "tickets").exists() else []
    world.barrier()
    given = options if "--ratio" in options else (*options, "--ratio", "0.5")
    assert run(["prune", str(source), *given]) == code
    err = capfd.readouterr().err
    if world.rank == 0:
        assert err.startswith("loft: ") and err.count("\n") == 1 and says in err
    world.barrier()
    assert sorted((source / "tickets").glob("*") if (source / "tickets").exists() else []) == before


def test_a_network_has_weights_alike(world):
    """What is drawn for a search is the same on every rank."""
    alike(world, {"scores": search(world).checkpoint()[0]["scores"], "weights": build(tiny(), seed=1).fc.weight.detach()})
