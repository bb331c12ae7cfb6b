"""What counts as an image and what becomes of it: names, links, kinds of files, pixels; images that are broken, and left out."""

import io
import json
import os
import random
import socket
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loft_hpc.cli.main import run
from loft_hpc.comm.alone import Alone
from loft_hpc.data.index import Index, index_of
from loft_hpc.data.leave_out import LIST_BYTES, read_list, to_line, to_text
from loft_hpc.data.listing import list_split
from loft_hpc.data.loader import Images, decode
from loft_hpc.data.registry import DataSettings, open_data
from loft_hpc.errors import LoftError

from test_data import CPU, make_folder
from test_folders import add, make_shards, make_tars, refuse


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def refusal(folder: Path, split: str = "train") -> str:
    """The one line about a split that cannot be listed."""
    with pytest.raises(LoftError) as told:
        list_split(folder, split)
    assert "\n" not in str(told.value)
    return str(told.value)


# -- names: a folder and its tar are the same data -------------------------------------------------------------------------

PARTS = ("a", "b", "a-b", "A", "1", "10", "2", "é", "x y", ".hidden", "._a", ".ipynb_checkpoints", "c.d", "...", "z")
ENDINGS = (".jpg", ".JPEG", ".Png", ".webp", ".tiff")


def grow(draw: random.Random, folder: Path) -> None:
    """Files with images' names, each with a content of its own, in folders; and hard and symbolic links to them."""
    files = []
    for _ in range(draw.randrange(3, 12)):
        path = folder.joinpath(*draw.choices(PARTS, k=draw.randrange(3)), draw.choice(PARTS) + draw.choice(ENDINGS))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        kind = draw.choice(("file", "file", "hard", "soft", "chain")) if files else "file"
        target = draw.choice(files) if files else None
        if kind == "file":
            path.write_bytes(draw.randbytes(draw.randrange(1, 2000)))
        elif kind == "hard":
            os.link(os.path.realpath(target), path)
        else:
            path.symlink_to(os.path.relpath(target, path.parent))
        if kind != "chain":
            files.append(path)
    (folder / "always.png").write_bytes(b"an image")


@pytest.mark.parametrize("seed", range(30))
def test_a_folder_and_its_tar_are_the_same_images_in_the_same_order(tmp_path, seed):
    draw = random.Random(seed)
    for name in ("cat", "c.at", "dog"):
        (tmp_path / "folder" / "train" / name).mkdir(parents=True)
        grow(draw, tmp_path / "folder" / "train" / name)
    (tmp_path / "tars" / "train").mkdir(parents=True)
    for place in (tmp_path / "folder" / "train").iterdir():
        tar = tmp_path / "tars" / "train" / f"{place.name}.tar"
        subprocess.run(["tar", f"--format={draw.choice(('gnu', 'pax', 'ustar'))}", "-C", place, "-cf", tar, "."], check=True)
    (tmp_path / "tars" / "train" / "._cat.tar").write_bytes(b"what macOS writes beside a file")
    plain, packed = (list_split(tmp_path / layout, "train") for layout in ("folder", "tars"))
    assert list(packed.names) == list(plain.names) and not any("/." in name for name in plain.names if "/..." not in name)
    assert torch.equal(packed.labels, plain.labels) and packed.classes == plain.classes
    ours, theirs = (Images(tmp_path / layout, {"train": index}, 32) for layout, index in (("tars", packed), ("folder", plain)))
    for number in range(len(plain)):
        assert ours._content("train", number) == theirs._content("train", number)


def test_dot_files_are_no_part_of_a_shard(tmp_path):
    root = make_shards(make_folder(tmp_path / "folder"), tmp_path / "shards")
    before = list(list_split(root, "train").names)
    with tarfile.open(root / "train" / "shard-0000.tar", "a") as tar:
        for name in ("._000000.png", "._000000.cls", ".ipynb_checkpoints/7.png", "./.DS_Store", "._x.cls"):
            add(tar, name, b"\0\5\26\7")
    assert list(list_split(root, "train").names) == before


# -- names twice -----------------------------------------------------------------------------------------------------------


def write_tar(path: Path, names: list[str]) -> None:
    """Labels are 0, images say where they stand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add(tar, name, b"0" if name.lower().endswith("cls") else b"%d" % number)


SHARD = ["0.jpg", "0.cls", "x/1.png", "x/1.cls"]


@pytest.mark.parametrize(
    ("twice", "key"),
    [
        *((name, name) for name in SHARD),
        *((f"./{name}", name) for name in SHARD),
        *((f"/x/../{name}", name) for name in SHARD),
        ("0.CLS", "key 0"),
        ("0.png", "key 0"),
        ("x/1.jpeg", "key x/1"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_key_twice_in_a_shard_is_refused(tmp_path, twice, key, first):
    """Keys that begin at 0 again are the usual case: the later labels were taken for the earlier images."""
    write_tar(tmp_path / "train" / "s.tar", [twice, *SHARD] if first else [*SHARD, twice])
    told = refusal(tmp_path)
    assert key in told and str(tmp_path / "train" / "s.tar") in told


def test_a_key_may_come_again_in_another_shard(tmp_path):
    for name in ("s-0.tar", "s-1.tar"):
        write_tar(tmp_path / "train" / name, SHARD)
    assert len(set(list_split(tmp_path, "train").names)) == 4


@pytest.mark.parametrize("twice", ["b/1.jpg", "./b/1.jpg", "b/./1.jpg", "/b/1.jpg", "c/../b/1.jpg"])
def test_a_name_twice_in_the_tar_of_a_class_is_refused(tmp_path, twice):
    write_tar(tmp_path / "train" / "cat.tar", ["a.jpg", "b/1.jpg", twice])
    told = refusal(tmp_path)
    assert "b/1.jpg twice" in told and str(tmp_path / "train" / "cat.tar") in told


@pytest.mark.parametrize("others", [("cat.tar", "cat.TAR"), ("cat.tar", "cat.tgz"), ("cat.Tar", "cat.tbz")])
def test_tars_that_name_one_class_are_refused(tmp_path, others):
    for name in (*others, "dog.tar"):
        write_tar(tmp_path / "train" / name, ["a.jpg"])
    told = refusal(tmp_path)
    assert all(name in told for name in others) and "dog" not in told


# -- what is no file -------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


NO_FILES = {
    "absolute link": (tarfile.SYMTYPE, "/etc/passwd"),
    "link out": (tarfile.SYMTYPE, "../dog/1.jpg"),
    "link to nothing": (tarfile.SYMTYPE, "gone.jpg"),
    "link to itself": (tarfile.SYMTYPE, "it"),
    "link to a folder": (tarfile.SYMTYPE, "folder"),
    "absolute link to a member's name": (tarfile.SYMTYPE, "/1.jpg"),
    "hard link to nothing": (tarfile.LNKTYPE, "gone.jpg"),
    "hard link to itself": (tarfile.LNKTYPE, "it"),
    "pipe": (tarfile.FIFOTYPE, ""),
    "device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""),
    "of another volume": (b"M", ""),
    "of no known type": (b"Z", ""),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["it.jpg", "it.cls"])
def test_a_member_that_is_no_file_is_refused_where_its_content_counts(tmp_path, kind, name):
    content, (letter, target) = io.BytesIO(), NO_FILES[kind]
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(special("folder", tarfile.DIRTYPE))
        add(tar, "1.jpg", b"image")
        if name == "it.cls":
            add(tar, "1.cls", b"0")
            add(tar, "it.jpg", b"image")
        tar.addfile(special(name, letter, name if target == "it" else target))
    path = tmp_path / "train" / "cat.tar"
    path.parent.mkdir()
    path.write_bytes(content.getvalue())
    told = refusal(tmp_path)
    assert name in told and str(path) in told and ("link" in told) == ("link" in kind)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_sparse_member_is_refused(tmp_path, format):
    (tmp_path / "train").mkdir()
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"image")
    subprocess.run(["tar", f"--format={format}", "-S", "-C", tmp_path, "-cf", tmp_path / "train" / "cat.tar", "hole.jpg"], check=True)
    assert "hole.jpg, a sparse file" in refusal(tmp_path)


def make_entry(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
        server.close()
    else:
        path.symlink_to({"loop": path.name, "nothing": "gone", "around": "..", "far around": "../../.."}[kind])


@pytest.mark.parametrize("name", ["1.jpg", "1"])
@pytest.mark.parametrize(
    ("kind", "words"), [("loop", "loop of links"), ("nothing", "a link to nothing"), ("around", "lies in"), ("far around", "lies in")]
)
def test_links_that_lead_nowhere_are_refused_in_folders_and_said_to_be_links(tmp_path, name, kind, words):
    (tmp_path / "train" / "cat" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "0.jpg").touch()
    make_entry(tmp_path / "train" / "cat" / "deep" / name, kind)
    told = refusal(tmp_path)
    assert words in told and f"deep/{name}" in told and "permissions" not in told


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_has_an_images_name_and_is_no_file_is_refused_and_nobody_waits_for_it(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    make_entry(tmp_path / "train" / "cat" / "0.jpg", kind)
    assert "0.jpg is a pipe or device" in refusal(tmp_path)
    (tmp_path / "val").mkdir()
    make_entry(tmp_path / "val" / "cat.tar", kind)
    assert "cat.tar" in refusal(tmp_path, "val")


def test_a_class_whose_link_leads_nowhere_is_missed(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "eel").symlink_to(tmp_path / "unmounted")
    assert "train/eel is a link to nothing" in refusal(tmp_path)


# -- pixels ----------------------------------------------------------------------------------------------------------------

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
FORMATS = {
    "PNG": {},
    "TIFF": {},
    "PPM": {},
    "BMP": {},
    "GIF": {},
    "WEBP": {"lossless": True, "exact": True},
    "JPEG2000": {},
    "JPEG": {"quality": 100},
}


def in_mode(mode: str) -> Image.Image:
    """A ramp from black to white, without transparency."""
    if mode in ("I;16", "I;16L", "I;16N"):
        return Image.fromarray(RAMP.astype(np.uint16) * 257)
    if mode == "I;16B":
        return Image.frombytes("I;16B", (256, 8), (RAMP.astype(">u2") * 257).tobytes())
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    grey = Image.fromarray(RAMP)
    if mode == "P":
        return grey.convert("P")
    return (
        grey.convert({"LAB": "RGB", "PA": "P"}.get(mode, "RGB")).convert(mode)
        if mode not in ("L", "1", "LAB")
        else grey.convert("L" if mode == "LAB" else mode)
    )


def saved(image: Image.Image, format: str, **details) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **FORMATS[format] | details)
    return content.getvalue()


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_keeps_its_levels_or_is_refused(mode):
    """Whatever Pillow can write of a mode is read as the same ramp, within what the format itself loses."""
    tried, refused = 0, None
    for format in FORMATS:
        if mode[0] in "IF" and format in ("GIF", "WEBP"):
            continue  # Pillow's writers clip it
        try:
            content = saved(in_mode(mode), format)
            stored = Image.open(io.BytesIO(content)).mode
        except (OSError, ValueError, KeyError):
            continue  # there is no such file
        tried += 1
        try:
            pixels = np.asarray(decode(content)).astype(int)
        except ValueError:
            refused = format
        if refused == format:
            assert stored in ("I", "F") or stored.startswith("I;") or mode == "LAB", (format, stored)
            continue
        assert pixels.shape == (8, 256, 3) and pixels.min() <= 8 and pixels.max() >= 246, (format, stored)
        if mode == "1":
            assert set(np.unique(pixels)) <= {*range(4), *range(252, 256)}
        else:
            # in palettes and YCbCr a ramp is coarse
            far = 60 if "P" in (mode, stored) or mode == "PA" else 6
            assert np.abs(pixels - RAMP[:, :, None]).max() <= far, (format, stored)
            assert (np.diff(pixels.mean((0, 2))) >= -far).all(), (format, stored)
    assert tried or mode in ("La", "RGBa", "HSV", "I;16L", "I;16N")


def png(colour: int, levels: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG with 16 bits of (H, W, channels) levels, of which Pillow writes only grey ones."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", extra) if extra else b"", chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bits_are_scaled_alike_in_grey_and_in_colour():
    wide = np.linspace(0, 65535, 1024).astype(int).reshape(4, 256, 1)
    grey, colour = (np.asarray(decode(png(kind, wide.repeat(channels, 2)))) for kind, channels in ((0, 1), (2, 3)))
    assert np.array_equal(grey, colour) and np.array_equal(grey[:, :, :1], wide >> 8)
    full = np.full_like(wide, 65535)
    for kind, channels in ((4, [wide, full]), (6, [wide, wide, wide, full])):
        assert np.array_equal(np.asarray(decode(png(kind, np.concatenate(channels, 2)))), grey)
    for depth in (b"65535", b"1000"):
        most = int(depth)
        content = b"P5 256 4 %s\n" % depth + (wide * most // 65535).astype(">u2").tobytes()
        assert np.abs(np.asarray(decode(content)).astype(int) - grey).max() <= 1


def tiff(bits: int, photometric: int, sample_format: int, order: str, content: bytes) -> bytes:
    """One row of 256 grey pixels."""
    tags = {
        256: 256,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 12 * 10 + 4,
        277: 1,
        278: 1,
        279: len(content),
        339: sample_format,
    }
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags.items())
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + content


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [8, 12, 16, 32])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("sample_format", [1, 2, 3])
def test_a_tiff_is_read_rightly_or_refused(order, bits, photometric, sample_format):
    """White as 0, signed levels, 12 and 32 bits, floating point: Pillow takes many of them for what they are not."""
    levels = RAMP[0].astype(np.uint64)
    if bits == 12:
        packed = b"".join(int(f"{16 * one:03x}{16 * other:03x}", 16).to_bytes(3, "big") for one, other in levels.reshape(-1, 2))
    else:
        packed = (levels * {8: 1, 16: 257, 32: 16843009}[bits]).astype(f"{order}u{bits // 8}").tobytes()
    content = tiff(bits, photometric, sample_format, order, packed)
    try:
        pixels = np.asarray(decode(content))[0, :, 0]
    except ValueError:
        assert (bits, sample_format) != (8, 1) and (bits, photometric, sample_format) != (16, 1, 1)
        return
    assert np.array_equal(pixels, RAMP[0] if photometric else RAMP[0, ::-1])
    assert sample_format == 1


def test_16_bits_of_which_nothing_would_be_left_are_refused():
    with pytest.raises(ValueError, match="levels 0 to 9 are used"):
        decode(png(0, np.arange(100).reshape(10, 10, 1) // 10))
    assert np.asarray(decode(png(0, np.full((4, 4, 1), 9)))).max() == 0  # one level is one level


def half_transparent() -> dict[str, bytes]:
    """The left half is black and counts; the right half is transparent, with hidden colours."""
    colour = np.zeros((8, 8, 4), dtype=np.uint8)
    colour[:, 4:, :3] = 77
    colour[:, :4, 3] = 255
    grey, everything = Image.fromarray(colour[:, :, 0]), Image.fromarray(colour)
    palette = Image.fromarray((colour[:, :, 0] > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 77, 77, 77])
    wide = colour[:, :, :1].astype(int) * 257
    return {
        "RGBA": saved(everything, "PNG"),
        "RGBA in TIFF": saved(everything, "TIFF"),
        "RGBA in WebP": saved(everything, "WEBP"),
        "LA": saved(everything.convert("LA"), "PNG"),
        "L with a transparent level": saved(grey, "PNG", transparency=77),
        "RGB with a transparent colour": saved(everything.convert("RGB"), "PNG", transparency=(77, 77, 77)),
        "P with a transparent index": saved(palette, "PNG", transparency=1),
        "P with levels": saved(palette, "PNG", transparency=bytes([255, 0])),
        "P in GIF": saved(palette, "GIF", transparency=1),
        "16 bits with a transparent level": png(0, wide, (77 * 257).to_bytes(2, "big")),
        "LA of 16 bits": png(4, np.concatenate([wide, 65535 * (wide == 0)], 2)),
    }


@pytest.mark.parametrize("kind", half_transparent())
def test_what_is_transparent_is_white(kind):
    pixels = np.asarray(decode(half_transparent()[kind]))
    assert pixels.shape == (8, 8, 3) and (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


def test_what_is_opaque_is_the_same_with_and_without_alpha():
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    with_alpha = image.copy()
    with_alpha.putalpha(255)
    assert np.array_equal(np.asarray(decode(saved(with_alpha, "PNG"))), np.asarray(image))


def test_16_bit_colours_with_a_transparent_one_are_refused():
    wide = np.linspace(0, 65535, 768).astype(int).reshape(4, 64, 3)
    with pytest.raises(ValueError, match="transparent"):
        decode(png(2, wide, b"\xff\xff" * 3))


# -- images that cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_wrong_with_an_image_is_one_line(tmp_path, monkeypatch):
    """Bytes flipped, cut and swapped in files of every format: each is read, or the line says why not, without Python's own words."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    draw, index = random.Random(0), list_split(make_folder(tmp_path, count=1), "train")
    images, path, lines = Images(tmp_path, {"train": index}, 32), tmp_path / index.names[0], set()
    contents = [saved(in_mode(mode), format) for mode, format in (("RGB", "JPEG"), ("RGB", "PNG"), ("L", "TIFF"), ("P", "GIF"), ("RGB", "WEBP"),
                ("RGB", "BMP"), ("I;16", "PNG"), ("RGB", "PPM"), ("RGB", "JPEG2000"))]  # fmt: skip
    for content in [b"", b"nonsense", *contents * 40]:
        spoilt = bytearray(content)
        for _ in range(draw.randrange(1, 6) if spoilt else 0):
            spoilt[draw.randrange(min(len(spoilt), draw.choice((60, len(spoilt)))))] = draw.randrange(256)
        path.write_bytes(spoilt[: draw.randrange(len(spoilt))] if draw.random() < 0.3 and spoilt else spoilt)
        sample = images[("train", 0, None)]
        if isinstance(sample, str):
            lines.add(sample)
    assert len(lines) > 10
    for line in lines:
        assert f"the image {path} cannot be read (" in line and "read ()" not in line and "\n" not in line and "0x" not in line, line


@given(st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name and b"/" not in name)))
def test_a_list_gives_back_the_names_that_it_was_made_of(tmp_path_factory, parts):
    names = [f"{split}/{os.fsdecode(part)}" for part in parts for split in ("train", "val")]
    path = tmp_path_factory.mktemp("list") / "list"
    path.write_bytes(os.fsencode(to_text(names)))
    assert read_list(path) == tuple(sorted(set(names)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_list(path) == tuple(sorted(set(names)))


LISTS = {
    "no name": (b"train/a.jpg\n/data/train/a.jpg\n", "line 2 of the list"),
    "a class": (b"cat/a.jpg\n", "line 1 of the list"),
    "no JSON": (b'"train/a\n', "line 1 of the list"),
    "no string": (b'"train/a", 1\n', "line 1 of the list"),
    "too long": (b"train/a.jpg\n" * (LIST_BYTES // 12 + 1), "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("fault", LISTS)
def test_what_is_no_list_is_refused(tmp_path, fault):
    content, words = LISTS[fault]
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(LoftError, match=words) as told:
        read_list(tmp_path / "list")
    assert "\n" not in str(told.value)


def test_a_list_that_is_no_file_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path, code in ((tmp_path / "gone", 2), (tmp_path / "pipe", 1), (tmp_path, 1)):
        assert run(["doctor", "--dataset", "imagefolder", "--leave-out", str(path)]) == code
        assert capsys.readouterr().err.startswith(f"loft: the list {path} cannot be read")


def opened(folder: Path, *leave_out: str):
    return open_data(DataSettings("imagefolder", str(folder), image_size=32, loader_workers=0, leave_out=leave_out), CPU, Alone())


@pytest.mark.parametrize("layout", [None, make_tars, make_shards])
def test_images_left_out_are_no_part_of_the_data_and_of_the_fingerprint(tmp_path, layout):
    folder = make_folder(tmp_path / "folder")
    root = layout(folder, tmp_path / "packed") if layout else folder
    whole, index = opened(root), list_split(root, "train")
    names = (index.names[3], list_split(root, "val").names[5])
    data = opened(root, *names)
    assert (data.info.train_images, data.info.test_images, data.info.num_classes) == (11, 11, whole.info.num_classes)
    assert data.info.fingerprint != whole.info.fingerprint == opened(root).info.fingerprint
    assert len(index_of(root, "train", refuse)) == 12  # the index that is kept is whole
    every = [batch for batch, _ in whole.test_batches(1, 0, 1)]
    ours = [batch for batch, _ in data.test_batches(1, 0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(ours, every[:5] + every[6:], strict=True))


def test_what_cannot_be_left_out_is_refused(tmp_path):
    make_folder(tmp_path)
    train, val = (list(list_split(tmp_path, split).names) for split in ("train", "val"))
    for names, words in (
        (["train/cat/77.png"], "there is no image .*train/cat/77.png"),
        (["val/cat/0.png", "val/0.png"], "there is no image .*val/0.png"),
        ([name for name in train if "dog" in name], "all images of .*train/dog are left out"),
        (train, "all images of .*train are left out"),
        (val, "all images of .*val are left out"),
    ):
        with pytest.raises(LoftError, match=words):
            opened(tmp_path, *names)
    with pytest.raises(LoftError, match="named train/CLASS/IMAGE"):
        opened(tmp_path, "cat/0.png")
    with pytest.raises(LoftError, match="omit it for digits") as told:
        DataSettings("digits", leave_out=("train/cat/0.png",))
    assert told.value.usage


# -- loft doctor -----------------------------------------------------------------------------------------------------------


def examined(capsys, *arguments: object) -> tuple[int, dict]:
    code = run(["doctor", "--format", "json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


BROKEN = {
    "a class less in val": (lambda root: (root / "val" / "dog").rename(root / "dog"), "train alone has dog"),
    "checkpoints alone": (lambda root: (root / "train" / "dog").rename(root / "train" / ".ipynb_checkpoints"), "val alone has dog"),
    "an empty class": (lambda root: (root / "train" / "eel").mkdir(), "no image in eel"),
    "no val": (lambda root: (root / "val").rename(root / "test"), f"{os.sep}val"),
    "a loop": (lambda root: (root / "train" / "cat" / "1").symlink_to("1"), "loop of links"),
}


@pytest.mark.parametrize("fault", [None, *BROKEN])
def test_doctor_finds_what_the_reader_refuses(tmp_path, capsys, fault):
    root = make_folder(tmp_path)
    spoil, words = BROKEN[fault] if fault else (lambda root: None, "2 classes, 12 training and 12 test images")
    spoil(root)
    for options in (["--dataset", "imagefolder"], ["--dataset", "imagenet"], *([[]] if fault == "no val" else [])):
        code, told = examined(capsys, "--data-dir", root, *options)
        (finding,) = (found for found in told["findings"] if found["name"] in ("imagenet", "imagefolder"))
        assert finding["state"] == ("broken" if fault else "ok") and words in finding["found"]
        if options:
            assert len(told["findings"]) == 1 and code == (1 if fault else 0)
        elif fault:
            assert code == 1
    if fault:
        with pytest.raises(LoftError) as refused:
            opened(root)
        assert str(refused.value) == finding["found"]


def test_doctor_says_where_nothing_is(tmp_path, capsys):
    code, told = examined(capsys, "--data-dir", tmp_path, "--dataset", "cifar10")
    assert code == 1 and told["findings"][0]["state"] == "missing"
    assert run(["doctor", "--dataset", "mnist"]) == 2
    assert run(["doctor", "--dataset", "digits", "--every-image"]) == 2
    assert run(["doctor", "--every-image"]) == 2
    assert run(["doctor", "--dataset", "imagefolder", "--broken", "x"]) == 2


def test_broken_images_are_listed_and_the_list_leaves_them_out(tmp_path, capsys):
    root, lists = make_folder(tmp_path / "data"), [tmp_path / "one", tmp_path / "two"]
    look = ["doctor", "--data-dir", str(root), "--dataset", "imagefolder", "--every-image", "--loader-workers", "0"]
    assert run(look) == 0
    assert "24 can be read" in capsys.readouterr().out
    odd = root / "train" / "cat" / "a\nb \udcff.png"
    odd.write_bytes(b"")
    (root / "val" / "dog" / "3.png").write_bytes(b"nonsense")
    assert run([*look, "--broken", str(lists[0])]) == 1
    told = capsys.readouterr()
    assert "2 of 25 cannot be read" in told.out and f"--leave-out {lists[0]}" in told.out and "val/dog/3.png: no image" in told.out
    assert "25 of 25 images, 2 broken" in told.err
    assert read_list(lists[0]) == ("train/cat/a\nb \udcff.png", "val/dog/3.png")
    assert run([*look, "--leave-out", str(lists[0])]) == 0
    (root / "val" / "dog" / "4.png").write_bytes(b"")
    assert run([*look, "--leave-out", str(lists[0]), "--broken", str(lists[0])]) == 2  # nothing is overwritten
    assert run([*look, "--leave-out", str(lists[0]), "--broken", str(lists[1])]) == 1
    assert len(read_list(lists[1])) == 3
    capsys.readouterr()
    code, told = examined(capsys, *look[1:])
    assert code == 1 and {entry["image"] for entry in told["broken_images"]} == set(map(to_line, read_list(lists[1])))
    assert opened(root, *read_list(lists[1])).info.train_images == 12


def test_processes_that_check_find_the_same(tmp_path):
    make_folder(tmp_path, count=40)
    (tmp_path / "val" / "cat" / "7.png").write_bytes(b"")
    images = opened(tmp_path).images
    assert list(images.broken(0)) == list(images.broken(1))


def test_an_index_knows_each_name_once(tmp_path):
    index = list_split(make_folder(tmp_path), "train")
    assert isinstance(index, Index) and len(index.without([])) == len(index) and index.without([]).names == index.names
