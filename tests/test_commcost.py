"""The poster's communication column cell by cell, the closed formulas, and the time model."""

import json
import re
from dataclasses import replace

import pytest

from loft_hpc.analysis import timing
from loft_hpc.analysis.poster import POSTER, loft_bytes, poster_table
from loft_hpc.analysis.timing import Cluster
from loft_hpc.analysis.traffic import Division, all_gather, all_reduce, all_to_all, delivered, division, loft_round
from loft_hpc.cli.main import run
from loft_hpc.cli.presets import NAMES, read_preset
from loft_hpc.data.dataset import DataSet
from loft_hpc.data.embedded import digits, synthetic, textures
from loft_hpc.data.registry import known_shape
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import architecture
from loft_hpc.models.groups import FilterGroup

from tiny import CPU

# facts/loft.md: the formula's values for the ten cells, S = 2 then S = 4
VALUES = [104.5906, 144.2791, 104.6014, 144.3006, 104.7753, 144.6485, 104.7861, 144.6700, 791.0972, 1284.8371]


def test_all_ten_cells():
    rows = poster_table()
    assert len(POSTER) == 10
    assert [row.loft_gigabytes for row in rows] == pytest.approx(VALUES, abs=5e-5)
    assert all(abs(row.loft_difference_gigabytes) <= 0.02 for row in rows)


def test_gpipe_up_to_what_is_unexplained():
    """facts/loft.md: 131.07G and 20,570.8G, 0.62 % and 1.86 % below the printed cells; ratios 3.5 and 2.5."""
    rows = poster_table()
    assert [row.gpipe_gigabytes for row in rows] == pytest.approx([131.072, 458.752] * 4 + [20570.83, 51427.07], abs=5e-3)
    assert [round(100 * row.gpipe_unexplained, 2) for row in rows] == [0.62] * 8 + [1.86] * 2
    assert rows[-1].gpipe_at_stages_gigabytes == pytest.approx(3.5 * 20570.83, abs=0.05)


def test_the_one_misprint():
    assert [(row.cell.setting.dataset, row.cell.workers) for row in poster_table() if row.misprint] == [("ImageNet", 2)]
    misprinted = next(row for row in poster_table() if row.misprint)
    assert misprinted.printed_quotient == pytest.approx(26.49, abs=0.005)
    assert misprinted.cell.improvement_printed == 21.60


def test_parameter_counts_of_the_facts():
    shared = [row.divided.shared for row in poster_table()[::2]]
    assert shared == [9_922_122, 9_924_810, 9_968_292, 9_970_980, 10_286_248]
    assert {row.divided.partitioned for row in poster_table()} == {32_451_072, 12_389_888}


def hidden(width: int) -> FilterGroup:
    return FilterGroup("layer1.0", 1, width, (), False)


def test_formulas_of_a_round():
    divided = Division(partitioned=100, shared=10, groups=((hidden(10), 10),))
    assert loft_bytes(divided, workers=4, transfers=3) == 4 * 3 * (100 + 40)
    assert loft_bytes(divided, 1, 3) == 0 and loft_round(divided, 1) == []
    assert delivered(loft_round(divided, 4)) == 4 * (4 * 100 + 4 * 10)
    # 10 filters over 4 workers: shares of 3, 3, 2, 2; (9 + 9 + 4 + 4) / 10 of 10 filters stay on average
    assert divided.moved_on_average(4) == pytest.approx(100 - 26)
    assert delivered(loft_round(divided, 4, "alltoall", moved=70)) == 4 * (70 + 40)
    assert delivered(loft_round(divided, 4, "alltoall", 2, copies=2, moved=70)) == 2 * 2 * (70 + 3 * 10 + 4 * 10)


def test_ten_times_below_the_posters_gpipe():
    """The poster's CIFAR row, 4 workers, 500 exchanges: 461.60G of GPipe over what LoFT delivers to workers."""
    divided = division(architecture("preresnet34", 10, widen=2), "all-blocks")
    assert divided.shared == 185_674  # facts: 0.19M
    assert sum(group.width * parameters for group, parameters in divided.groups) == divided.partitioned
    assert divided.moved_on_average(4) == pytest.approx(0.75 * divided.partitioned)
    assert 461.60e9 / (500 * delivered(loft_round(divided, 4, "alltoall", element_bytes=2))) > 14


@pytest.mark.parametrize(
    ("dataset", "opened"), [("digits", digits(CPU)), ("textures", textures(CPU)), ("synthetic", synthetic(CPU))], ids=lambda v: str(v)[:9]
)
def test_shapes_are_those_of_the_data(dataset: str, opened: DataSet):
    shape, info = known_shape(dataset), opened.info
    assert (shape.num_classes, shape.channels, shape.image_size, shape.train_images, shape.stem) == (
        info.num_classes, info.channels, info.image_size, info.train_images, info.stem,
    )  # fmt: skip


CLUSTER = Cluster("test", latency_seconds=0.5, bandwidth_bytes_per_second=10.0, flops_per_second=3.0)


def test_collectives_by_alpha_and_beta():
    divided = Division(partitioned=40, shared=20, groups=((hidden(4), 10),))
    gather, reduce = loft_round(divided, 4)
    assert CLUSTER.collective_seconds([gather], 4) == pytest.approx(3 * (0.5 + 160 / (4 * 10)))
    assert CLUSTER.collective_seconds([reduce], 4) == pytest.approx(6 * (0.5 + 80 / (4 * 10)))


NODES = replace(CLUSTER, ranks_per_node=4, inside_latency_seconds=0.25, inside_bandwidth_bytes_per_second=40.0)
INSIDE = replace(CLUSTER, latency_seconds=0.25, bandwidth_bytes_per_second=40.0)
FLOWS = [all_reduce(1000, 4, 8, "shared"), all_gather(999, 4, 8, "shared"), all_to_all(1234, 2, 8, "shared").times(7)]


def test_one_rank_a_node_is_a_cluster_without_nodes_bit_for_bit():
    single = replace(NODES, ranks_per_node=1)
    for flow in FLOWS:
        assert single.collective_seconds([flow], 8) == CLUSTER.collective_seconds([flow], 8)
        rounds = {"allreduce": 14, "allgather": 7, "alltoall": 7}[flow.operation]
        flat = flow.calls * rounds * 0.5 + flow.largest_rank_bytes / 10.0  # as before there were nodes
        assert single.collective_seconds([flow], 8) == flat
    work = ([3.0, 5.0, 2.0], [7.0, 9.0], 4, False)
    assert timing.pipeline_step(single, *work) == timing.pipeline_step(CLUSTER, *work)


def test_within_one_node_links_are_those_inside():
    whole = replace(NODES, ranks_per_node=8)
    assert whole.collective_seconds(FLOWS, 8) == INSIDE.collective_seconds(FLOWS, 8)
    work = ([3.0, 5.0, 2.0], [7.0, 9.0], 4, False)
    assert timing.pipeline_step(whole, *work) == timing.pipeline_step(INSIDE, *work)


def test_a_ring_over_nodes_is_paced_by_its_slowest_link():
    """One rank of a node sends out of it, so nobody shares the link between nodes: as if every link were that one."""
    ring = FLOWS[:2]
    assert NODES.collective_seconds(ring, 8) == CLUSTER.collective_seconds(ring, 8) > INSIDE.collective_seconds(ring, 8)
    swift = replace(NODES, latency_seconds=0.0, bandwidth_bytes_per_second=1e9)
    assert swift.collective_seconds(ring, 8) == INSIDE.collective_seconds(ring, 8)


def played_ring(links: list[float], steps: int) -> float:
    """Seconds until all ranks have sent `steps` chunks, each when the last one is sent and the one before has come."""
    ready = [0.0] * len(links)
    for _ in range(steps):
        ready = [max(ready[rank], ready[rank - 1]) + seconds for rank, seconds in enumerate(links)]
    return max(ready)


@pytest.mark.parametrize("workers", [8, 12, 10])
def test_a_ring_played_step_by_step_takes_as_long(workers):
    flow = all_gather(120 * workers, 4, workers, "shared")
    chunk = 480.0
    leaves = [(rank + 1) % 4 == 0 or rank + 1 == workers for rank in range(workers)]
    links = [(0.5 + chunk / 10) if out else (0.25 + chunk / 40) for out in leaves]
    assert NODES.collective_seconds([flow], workers) == pytest.approx(played_ring(links, workers - 1))


def test_ranks_of_a_node_share_its_link_in_an_all_to_all():
    """8 ranks on 2 nodes: a rank's 7 messages of 100 bytes, 3 inside, 4 outside at a quarter of the link."""
    flow = all_to_all(8 * 700, 1, 8, "shared")
    assert NODES.collective_seconds([flow], 8) == pytest.approx(3 * (0.25 + 100 / 40) + 4 * (0.5 + 100 / (10 / 4)))


def test_a_message_between_stages_takes_the_link_between_their_ranks():
    no_work = [0.0] * 5
    step = timing.pipeline_step(NODES, no_work, [100.0] * 4, 1, False)  # 3 cuts inside a node of 4, the 4th out of it
    assert step.total == pytest.approx(2 * (3 * (0.25 + 2.5) + 0.5 + 10))


def test_placed_ranks_count_where_a_node_is_described():
    assert NODES.placed(2).ranks_per_node == 2 and NODES.placed(None) == NODES and CLUSTER.placed(4) == CLUSTER


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 1), (3, 4), (4, 8)])
def test_a_pipeline_without_messages_fills_and_drains(stages, micro_batches):
    """GPipe, section 2.2: (m + K - 1) slots each way; forward 1 s, backward 2 s a micro-batch."""
    swift = Cluster("swift", 0.0, 1e30, 3.0)
    step = timing.pipeline_step(swift, [3.0] * stages, [0.0] * (stages - 1), micro_batches, recompute=False)
    assert step.total == pytest.approx(3 * (micro_batches + stages - 1))
    assert step.compute == pytest.approx(3 * micro_batches)
    assert timing.pipeline_step(swift, [3.0] * stages, [0.0] * (stages - 1), micro_batches, True).total == pytest.approx(
        4 * (micro_batches + stages - 1)
    )


def test_a_slow_link_paces_a_pipeline():
    """2 stages, 5 s a message, 1 s and 2 s of work: messages queue on the link, the last one is worked on when it has come."""
    slow = Cluster("slow", 0.0, 1.0, 3.0)
    step = timing.pipeline_step(slow, [3.0, 3.0], [5.0], 3, recompute=False)
    forward = 1 + 3 * 5 + 1
    assert step.total == pytest.approx(forward + 2 + 3 * 5 + 2)


GOOD = 'name = "x"\nlatency_seconds = 1\nbandwidth_bytes_per_second = 1\nflops_per_second = 1\n'
INSIDE_A_NODE = "inside_latency_seconds = 1\ninside_bandwidth_bytes_per_second = 1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('name = "x"\nlatency_seconds = 1e-6\n', "lacks bandwidth_bytes_per_second, flops_per_second"),
        ("name = ", "is no TOML file"),
        ('name = "x"\nlatency_seconds = -1\nbandwidth_bytes_per_second = 1\nflops_per_second = 1', "latency_seconds must be a number from 0"),
        ('name = "x"\nlatency_seconds = 1\nbandwidth_bytes_per_second = "1G"\nflops_per_second = 1', "bandwidth_bytes_per_second must be a number from 1"),
        ('name = "x"\nlatency_seconds = 1\nbandwidth_bytes_per_second = 0\nflops_per_second = 1', "bandwidth_bytes_per_second must be a number from 1"),
        ('name = "x"\nlatency_seconds = 1\nbandwidth_bytes_per_second = 1\nflops_per_second = 1\nflop = 2', "has flop, which no cluster has"),
        (GOOD + "ranks_per_node = 4", "lacks inside_latency_seconds, inside_bandwidth_bytes_per_second: a node needs"),
        (GOOD + "ranks_per_node = 1.5\n" + INSIDE_A_NODE, "ranks_per_node must be a whole number from 1"),
        (GOOD + 'device = "tpu"', "device must be one of cpu, cuda"),
    ],
)  # fmt: skip
def test_cluster_files_that_describe_no_cluster(tmp_path, text, told):
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(LoftError, match=told):
        Cluster.read(str(tmp_path / "cluster.toml"))


@pytest.mark.parametrize("file", sorted(timing.EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_examples_can_be_read_and_name_their_sources(file):
    assert Cluster.read(file.stem).source and Cluster.read(file.stem) == Cluster.read(str(file))


def case(capsys, *options: str) -> list[dict]:
    assert run(["commcost", *options, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)["cases"]


def test_any_case(capsys):
    options = ("--model", "preresnet34", "--widen", "2", "--workers", "2,4,8", "--rounds", "500", "--cluster", "ethernet-1g")
    found = {(row["strategy"], row["workers"]): row for row in case(capsys, *options)}
    assert found["loft", 4]["handed_over_bytes"] == round(144.27912e9)  # the poster's cell
    # 781 batches of 64 an epoch, the rest of the 50,000 images dropped
    assert found["gpipe", 4]["delivered_bytes"] == 2 * 4 * 781 * 64 * 10 * (65536 + 32768 + 16384)
    assert found["gpipe", 8]["delivered_bytes"] is None and "4 stages" in found["gpipe", 8]["impossible"]
    assert all(row["epoch_seconds"] > row["epoch_compute_seconds"] for row in found.values() if not row["impossible"])


def test_images_of_a_case_are_those_of_all_workers(capsys):
    """781 batches of 64 an epoch, of every LoFT worker, and of all together in the others."""
    options = ("--workers", "2,4", "--epochs", "3", "--model", "resnet20", "--split", "balanced")
    for more, loft in (((), {2: 2 * 781, 4: 4 * 781}), (("--shard-data",), {2: 2 * 390, 4: 4 * 195})):
        for row in case(capsys, *options, *more):
            assert row["images"] == 3 * 64 * (loft[row["workers"]] if row["strategy"] == "loft" else 781)


def test_a_case_says_how_many_times_fewer(capsys):
    """By epochs and by images: quotients of the rows; what GPipe cannot do is left out."""
    case = ["commcost", "--preset", "imagenet-preresnet18", "--workers", "4,16"]
    assert run([*case, "--format", "json"]) == 0
    rows = {(row["strategy"], row["workers"]): row["handed_over_bytes"] for row in json.loads(capsys.readouterr().out)["cases"]}
    assert run(case) == 0
    four, sixteen = (line for line in capsys.readouterr().out.splitlines() if "workers: in as many epochs" in line)
    found = [float(number) for number in re.findall(r"([\d.]+) times fewer", four)]
    ratios = [rows[other, 4] / rows["loft", 4] for other in ("gpipe", "data-parallel")]
    assert found == pytest.approx([*ratios, *(4 * ratio for ratio in ratios)], rel=0.01)
    assert four.startswith("4 workers: ") and sixteen.startswith("16 workers: ") and "gpipe" not in sixteen


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_case(capsys, name):
    rows = case(capsys, "--preset", name, "--workers", "2", "--strategy", "loft", "--strategy", "data-parallel")
    recipe = read_preset(name)["pretrain"]
    every, batch = known_shape(recipe["dataset"]).train_images, recipe["batch-size"]
    own = every // 2 if recipe.get("shard-data") else every
    assert [row["images"] for row in rows] == [recipe["epochs"] * batch * count for count in (2 * (own // batch), every // batch)]


def test_a_preset_s_case_and_what_is_typed_beside_it(capsys):
    """The poster's ImageNet row, 6000 exchanges of 4 workers: 1284.84 GB. The recipe's 20 epochs make 6672."""
    options = ("--preset", "imagenet-preresnet18", "--workers", "4", "--strategy", "loft")
    (row,) = case(capsys, *options)
    assert row["handed_over_bytes"] / 6672 * 6000 == pytest.approx(VALUES[-1] * 1e9, rel=1e-6)
    (half,) = case(capsys, *options, "--epochs", "10")
    assert 2 * half["handed_over_bytes"] == row["handed_over_bytes"] and 2 * half["images"] == row["images"]
    assert run(["commcost", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("1.43 TB") == 1 and "preresnet18 x2 on imagenet, 20 epochs, batch 256" in printed


def test_printed_for_people_programs_and_papers(capsys, tmp_path):
    assert run(["commcost", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and "gpipe_unexplained" in lines[0]
    assert run(["commcost", "--format", "latex"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("\\begin{tabular}{l" + "r" * 11 + "}") and "+0.62 \\%" in printed and printed.count(" \\\\") == 11
    assert printed.count("131.07 GB & 131.88 GB") == 4 and "52,385.59 GB" in printed
    assert run(["commcost", "--workers", "2,4", "--cluster", "infiniband-hdr", "--plot", str(tmp_path / "cost.png")]) == 0
    printed = capsys.readouterr().out
    assert "handed over: " in printed and "24.2 GB/s" in printed and not re.search(r"\dG\b", printed)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--workers", "1,2"), 2, "is no list of numbers of workers"),
        (("--dataset", "imagefolder"), 2, "imagefolder has no shape of its own"),
        (("--cluster", "nowhere"), 1, "no cluster file nowhere"),
        (("--plot", "cost.jpg"), 2, "must end in .png, .pdf or .svg"),
        (("--micro-batches", "0"), 2, "must lie between 1 and"),
        (("--split", "7,3"), 2, "is not known"),
        (("runs/x", "--workers", "2"), 2, "options of a case say nothing about a run"),
        (("nowhere",), 1, "nowhere is no run"),
        (("--verify",), 2, "give their folders"),
        (("--preset", "nowhere", "--workers", "2"), 2, "'nowhere' is not one of"),
    ],
)
def test_mistakes(capsys, options, code, told):
    assert run(["commcost", *options]) == code
    assert told in capsys.readouterr().err
