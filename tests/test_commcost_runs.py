"""`loft commcost RUN...`: the sentence, the totals and the proof.

The runs are made of a run.json and a ledger that fits it, without training; tests/ranks/check_commcost.py has real ones.
"""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loft_hpc.cli.main import run
from loft_hpc.cli.units import bytes_text, times_text
from loft_hpc.comm.ledger import Entry, Ledger
from loft_hpc.data.registry import DataSettings, known_shape
from loft_hpc.filterwise.loft import LoftSettings
from loft_hpc.jobs.commcost import run_cost
from loft_hpc.jobs.pretrain import PretrainSettings, order_of
from loft_hpc.jobs.settings import to_json
from loft_hpc.models.architecture import architecture
from loft_hpc.pipeline.gpipe import PipelineSettings
from loft_hpc.runs.run import Run

from sentences import check_sentence, exchanged


def made(path: Path, strategy: str, workers: int = 4, local_iterations: int = 8, dataset: str = "digits", **settings) -> Path:
    """A finished run, its bytes all in the ledger of rank 0; `strategy`: a pretraining's, or `retrain`."""
    kind = "retrain" if strategy == "retrain" else "pretrain"
    given = PretrainSettings(**{
        "model": "resnet20", "strategy": "data-parallel" if kind == "retrain" else strategy, "epochs": 2, "batch_size": 48,
        "data": DataSettings(dataset), "loft": LoftSettings(local_iterations=local_iterations), "pipeline": PipelineSettings(split="balanced"),
    } | settings)  # fmt: skip
    shape = known_shape(dataset)
    network = architecture(given.model, shape.num_classes, shape.channels, shape.stem, given.widen)
    per_epoch = order_of(given, shape.train_images, 0, workers).steps_per_epoch
    steps = given.rounds * local_iterations if given.rounds else given.epochs * per_epoch
    data = {"name": dataset, "image_size": shape.image_size, "train_images": shape.train_images}
    details = {"architecture": network.to_json(), "world_size": workers, "total_steps": steps, "steps_per_epoch": per_epoch, "data": data}
    one = Run.create(path, kind, to_json(given) if kind == "pretrain" else {"batch_size": given.batch_size}, details)
    one.finish("done", {"steps": steps})
    one.write_ledger([Ledger()] * workers)
    total = Ledger()
    for row in run_cost(path).rows:
        total.record(row.operation, row.purpose, row.formula)
    total.record("allreduce", "control", Entry(1, 100, 200, 300, 300))
    one.write_ledger([total, *[Ledger()] * (workers - 1)])
    return path


def told(capsys, *arguments, code: int = 0) -> list[str]:
    capsys.readouterr()
    assert run(["commcost", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


PAIRS = [
    # the run, its reference, what they are called
    (("loft",), ("gpipe",), "LoFT", "GPipe"),
    (("loft",), ("data-parallel",), "LoFT", "data-parallel training"),
    (("data-parallel",), ("gpipe",), "Data-parallel training", "GPipe"),
    (("loft",), ("retrain", 4, 8, "digits"), "LoFT", "retraining"),
    (("retrain",), ("gpipe",), "Retraining", "GPipe"),
    (("loft", 4, 16), ("loft",), "LoFT (run)", "LoFT (reference)"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "other", "name", "reference"), PAIRS, ids=[f"{one[0][0]}-{one[1][0]}" for one in PAIRS])
def test_a_pair_of_runs_is_answered_by_its_first_line(tmp_path, monkeypatch, capsys, own, other, name, reference):
    monkeypatch.chdir(tmp_path)
    paths = made(Path("run"), *own), made(Path("reference"), *other)
    for order in (paths, paths[::-1]):
        said = check_sentence(told(capsys, *order)[0], *paths)
        assert (said["run"], said["other"]) == (name, reference)


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ({"epochs": 2}, {"epochs": 2}, "4 times the images"),  # each of 4 workers sees every image
        ({"epochs": 1}, {"epochs": 4}, "as many images"),
        ({"epochs": 1}, {"epochs": 8}, "2 times fewer images"),
        ({"loft": LoftSettings(shard_data=True)}, {}, "1.04 times fewer images"),  # 4 x 7 batches in shards of 359 images, 29 in 1437
    ],
)
def test_images_seen_are_those_of_all_workers(tmp_path, capsys, own, other, said):
    line = told(capsys, made(tmp_path / "a", "loft", **own), made(tmp_path / "b", "gpipe", **other))[0]
    check_sentence(line, tmp_path / "a", tmp_path / "b")
    assert line.endswith(f"; for {said}.")


def test_more_runs_are_compared_with_gpipe_or_with_the_one_that_sent_most(tmp_path, capsys):
    strategies = {"a": "loft", "b": "data-parallel", "c": "gpipe", "d": "loft"}
    paths = {name: made(tmp_path / name, strategy) for name, strategy in strategies.items()}
    lines = told(capsys, *paths.values())
    for line, name in zip(lines, "abd", strict=False):
        check_sentence(line, paths[name], paths["c"])
    assert [line.split(" handed")[0] for line in lines[:3]] == [f"LoFT ({paths['a']})", "Data-parallel training", f"LoFT ({paths['d']})"]
    assert lines[3] == "Every run is compared with GPipe, the baseline."
    lines = told(capsys, paths["a"], paths["b"], paths["d"])
    for line, name in zip(lines, "ad", strict=False):
        check_sentence(line, paths[name], paths["b"])
    assert lines[2] == "Every run is compared with data-parallel training, which handed over most."


def test_the_poster_s_cifar_row_as_one_run(tmp_path, capsys):
    """500 exchanges of 4 workers over the 10 x 50,000 images of the poster's GPipe: 144.28 GB and 458.75 GB, delivered 338.99 GB."""
    path = made(tmp_path / "run", "loft", model="preresnet34", widen=2.0, dataset="cifar10", rounds=500, local_iterations=5, batch_size=50)
    line = told(capsys, path)[0]
    assert line.startswith("LoFT handed over 144 GB (delivered 339 GB, on the wire ") and " for 500,000 images on 4 workers: " in line
    assert "3.2 times fewer than GPipe's 459 GB and " in line and line.endswith(" for as many images (predicted, not measured).")
    second = told(capsys, path)[1]
    assert second.startswith("In as many epochs, which are 4 times fewer images for them: 1.3 times as many as GPipe's 115 GB and ")
    predicted = json.loads("\n".join(told(capsys, path, "--format", "json")))["predicted"]
    gpipe, parallel = (one["handed_over_bytes"] for one in predicted)
    assert gpipe == 2 * 4 * 500_000 * (65536 + 32768 + 16384)
    # an all-reduce of every parameter in each of 2500 steps of 4 x 50 images
    assert parallel == 2500 * 4 * 4 * (32_451_072 + 9_922_122)
    assert predicted[0]["handed_over_bytes_ratio"] == pytest.approx(458.752 / 144.27912, rel=1e-6)


def test_a_pipeline_that_cannot_be_is_not_predicted(tmp_path, capsys):
    """resnet20 has 9 blocks."""
    path = made(tmp_path / "run", "loft", workers=10, batch_size=48)
    assert [one["strategy"] for one in json.loads("\n".join(told(capsys, path, "--format", "json")))["predicted"]] == ["data-parallel"]
    assert "GPipe" not in told(capsys, path)[0] and "than data-parallel training's" in told(capsys, path)[0]


def test_one_worker_exchanges_nothing(tmp_path, capsys):
    alone, several = made(tmp_path / "alone", "loft", workers=1), made(tmp_path / "several", "data-parallel")
    assert told(capsys, alone)[0] == "LoFT exchanged nothing for 2,784 images on 1 worker."
    line, *_ = lines = told(capsys, alone, several)
    assert re.fullmatch(r"LoFT handed over 0 B, data-parallel training [\d.]+ MB; for as many images\.", line)
    assert "More than the strategy differs: the number of workers of LoFT is 1, of data-parallel training 4." in lines


def test_other_networks_and_data_are_named(tmp_path, capsys):
    lines = told(capsys, made(tmp_path / "a", "loft", model="resnet32"), made(tmp_path / "b", "gpipe", dataset="cifar10"))
    differing = [line for line in lines if line.startswith("More than the strategy differs")]
    assert len(differing) == 2 and "resnet32 with" in differing[0] and "of GPipe cifar10 at 32 x 32 pixels" in differing[1]


def test_totals_come_first_and_every_column_is_explained_below(tmp_path, capsys):
    paths = [made(tmp_path / "a", "loft"), made(tmp_path / "b", "gpipe")]
    _, empty, header, rule, *lines = told(capsys, *paths)
    assert empty == "" and set(rule) == {"-", " "}
    for line, path in zip(lines[:2], paths, strict=True):
        sent = exchanged(path)
        assert line.split("  ")[0] == str(path)
        assert all(bytes_text(value) in line for value in sent.values())
    columns = [name for name in re.split(r"  +", header) if name not in ("run", "strategy", "workers")]
    assert columns == ["handed over", "delivered", "on the wire", "besides", "images", "per image"]
    assert all(any(f"{name}: " in note for note in lines[2:]) for name in columns)
    quoted = [note for note in lines if "The LoFT poster's table counts this way" in note]
    assert len(quoted) == 1 and quoted[0].startswith("handed over: ") and "The LoFT poster's table counts this way" in quoted[0]
    assert not any(line.endswith("equal") for line in lines)


def test_for_programs_and_papers(tmp_path, capsys):
    paths = [made(tmp_path / "a", "loft"), made(tmp_path / "b", "gpipe")]
    fields = json.loads("\n".join(told(capsys, *paths, "--format", "json")))
    for one, path in zip(fields["runs"], paths, strict=True):
        assert [one["handed_over_bytes"], one["delivered_bytes"], one["wire_bytes"]] == list(exchanged(path).values())
        assert one["ledger_bytes"] == one["formula_bytes"] == one["handed_over_bytes"]
        assert one["handed_over_bytes_per_image"] == one["handed_over_bytes"] / one["images"]
    (compared,) = fields["comparisons"]
    own, other = map(exchanged, paths)
    assert (compared["path"], compared["reference_path"]) == tuple(map(str, paths))
    assert [compared[f"{name}_bytes_ratio"] for name in own] == [other[name] / own[name] for name in own]
    assert compared["images_ratio"] == 4
    totals = list(csv.DictReader(io.StringIO("\n".join(told(capsys, *paths, "--format", "csv")))))
    assert [int(row["wire_bytes"]) for row in totals] == [own["wire"], other["wire"]]
    proof = list(csv.DictReader(io.StringIO("\n".join(told(capsys, *paths, "--format", "csv", "--verify")))))
    assert len(proof) > 6 and all(row["equal"] == "True" for row in proof)
    paper = told(capsys, *paths, "--format", "latex")
    assert paper[0].startswith("\\begin{tabular}") and any(line.startswith("% LoFT handed over") for line in paper)


@pytest.mark.parametrize("column", ["payload_sent_bytes", "payload_received_bytes", "wire_sent_bytes", "wire_received_bytes"])
def test_a_ledger_that_is_not_the_formula_s_is_never_shown_as_if_it_were(tmp_path, capsys, column):
    good, bad = made(tmp_path / "good", "data-parallel"), made(tmp_path / "bad", "loft")
    opened = Run.open(bad)
    first, *others = opened.read_ledgers()
    entry = first.entries["allreduce"]["shared"]
    first.entries["allreduce"]["shared"] = replace(entry, **{column: getattr(entry, column) + 1})
    opened.write_ledger([first, *others])
    for format in ("table", "json", "csv", "latex"):
        assert run(["commcost", str(good), str(bad), "--format", format]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"loft: the ledger of {bad} does not equal the closed formula: allreduce shared has ")
        assert column in said.err and said.err.count("\n") == 1
    assert run(["commcost", str(good), str(bad), "--verify"]) == 1
    said = capsys.readouterr()
    assert sum(line.endswith("DIFFERENT") for line in said.out.splitlines()) == 1 and said.err.count("\n") == 1
    assert (
        f"NOT equal to the closed formula, so not to be quoted: the ledger of {bad}." in said.out and "Every ledger equals" not in said.out
    )


def test_the_proof_is_shown_when_asked_for(tmp_path, capsys):
    path = made(tmp_path / "run", "loft")
    rows = [line for line in told(capsys, path, "--verify") if line.endswith("  equal")]
    assert len(rows) == 4 and all(line.startswith(f"{path} ") for line in rows)


@pytest.mark.parametrize(
    ("changed", "arguments", "code", "said"),
    [
        ({"kind": "search"}, (), 1, "is neither a pretraining nor a retraining run"),
        ({"status": "running"}, (), 1, "finish it with --resume first"),
        ({}, ("{}",), 2, "a run is given twice"),
        ({}, ("--preset", "digits"), 2, "options of a case say nothing about a run"),
    ],
)
def test_runs_that_say_nothing(tmp_path, capsys, changed, arguments, code, said):
    path = made(tmp_path / "run", "loft")
    (path / "run.json").write_text(json.dumps(json.loads((path / "run.json").read_text()) | changed))
    if changed.get("status"):
        (path / "ledger.json").unlink()
    assert run(["commcost", str(path), *(argument.format(path) for argument in arguments)]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (999.5, "1.00 kB"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"), (99_940, "99.9 kB"),
        (99_960, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (23_456_789, "23.5 MB"), (144_279_120_000, "144 GB"),
        (999_500_000_000, "1.00 TB"), (10**15, "1,000 TB"), (1234 * 10**12, "1,234 TB"), (-2_900_000, "-2.90 MB"),
    ],
)  # fmt: skip
def test_bytes_in_the_unit_that_fits(size, text):
    assert bytes_text(size) == text


def test_bytes_in_somebody_s_unit():
    assert bytes_text(52_385_590_000_000, "GB") == "52,385.59 GB" and bytes_text(50_000, "GB", 4) == "0.0001 GB"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1, "1"), (1.02, "1.02"), (1.24, "1.2"), (3.43, "3.4"), (4, "4"), (26.49, "26.5"), (99.97, "100"), (1234.4, "1,234")],
)
def test_ratios_as_they_are_read(ratio, text):
    assert times_text(ratio) == text
