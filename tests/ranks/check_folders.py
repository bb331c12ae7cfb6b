"""Images on disk over real ranks: listed by rank 0, known to all, and every one seen."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from loft_hpc.data import folders
from loft_hpc.data.listing import list_split
from loft_hpc.data.order import Order
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError

from test_folders import colours, make_colours, make_shards
from tiny import CPU

SIZES = (3,)


@pytest.fixture
def folder(world):
    made = world.on_root(lambda: Path(tempfile.mkdtemp()))
    world.on_root(lambda: make_colours(made / "folder"))
    yield made
    world.barrier()
    world.on_root(lambda: shutil.rmtree(made))


def settings(folder: Path) -> DataSettings:
    return DataSettings("imagefolder", str(folder), image_size=32, loader_workers=0)


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_rank_0_lists_for_all_and_an_epoch_is_exact(world, folder, layout, monkeypatch):
    if layout == "shards":
        world.on_root(lambda: make_shards(folder / "folder", folder / "shards") and None)
    expected = list_split(folder / layout, "train")
    if world.rank:
        monkeypatch.setattr(folders, "list_split", lambda *_: pytest.fail("another rank listed the images"))
    data = open_data(settings(folder / layout), CPU, world)
    assert data.info.train_images == len(expected) == 48
    assert set(world.gather_objects(data.info)) == {data.info}
    order = Order("sharded", 48, 16 // world.size, 0, world.rank, world.size)
    walks = world.gather_objects(colours(data.train_batches(order, 0, order.steps_per_epoch)))
    seen = sorted(colour for walk in walks for colour in walk)
    assert len(set(seen)) == len(seen) == world.size * order.steps_per_epoch * (16 // world.size)
    tests = world.gather_objects(colours(data.test_batches(5, world.rank, world.size)))
    assert sorted(colour for walk in tests for colour in walk) == list(range(48))


def test_what_rank_0_finds_wrong_all_ranks_know(world, folder):
    world.on_root(lambda: (folder / "folder" / "train" / "empty").mkdir())
    with pytest.raises(LoftError, match="no image in empty"):
        open_data(settings(folder / "folder"), CPU, world)


def test_images_left_out_are_left_out_on_all_ranks(world, folder):
    name = list_split(folder / "folder", "train").names[7]
    data = open_data(replace(settings(folder / "folder"), leave_out=(name,)), CPU, world)
    assert data.info.train_images == 47 and set(world.gather_objects(data.info)) == {data.info}
    with pytest.raises(LoftError, match=r"no image .*train/none"):
        open_data(replace(settings(folder / "folder"), leave_out=("train/none",)), CPU, world)
