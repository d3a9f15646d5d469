"""Training from image folders and lists: what the pack of them is, and nothing from outside."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.files.image_files import open_image_files
from partialfc.data.files.index import read_list
from partialfc.data.images.formats import (
    MOST_BYTES,
    MOST_WHOLE_PIXELS,
    check_image,
    decode_image,
)
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order
from partialfc.data.packs import index_cache
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import RecordError
from partialfc.data.skip_list import write_skip_list
from tests.support.images import LOADERS, encoded, lopsided
from tests.support.places import FIXTURES, ROOT
from tests.support.processes import partialfc, python

COUNTS = {"10": 3, "9": 5, "100": 1, "2": 4}
ORDER = ["2", "9", "10", "100"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four people whose names are numbers, 13 images; large enough for its index to be kept."""
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for seed, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(
                encoded(lopsided(112, 112, 9 * seed + number))
            )
    return root


def listed(folder: Path) -> Path:
    """A list of the same images, mixed up."""
    images = sorted(folder.glob("*/*"))
    lines = [f"photos/{path.parent.name}/{path.name}\t{path.parent.name}\n" for path in images]
    path = folder.with_name("list.txt")
    path.write_text("".join(np.random.default_rng(1).permutation(lines)))
    return path


def png(pixels, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def stream_of(path, batch=4, rank=0, world_size=1, size=112):
    dataset = open_dataset([path])
    return Stream(
        dataset=dataset,
        order=Order(len(dataset), batch, seed=5, last_batch="pad"),
        augmentation=Augmentation(shift=2),
        image_size=size,
        rank=rank,
        world_size=world_size,
    )


def take(number, stream, samples_seen=0, loader="torch"):
    batches = open_batches(
        stream, samples_seen, device=torch.device("cpu"), loader=loader, threads=1
    )
    with contextlib.closing(batches):
        return list(itertools.islice(batches, number))


# What it is


def test_a_folder_is_what_the_pack_of_it_is(folder, tmp_path):
    """Sample for sample: a run may go from one to the other and sees the same images."""
    done = partialfc("pack", folder, tmp_path / "a.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    pack, files = open_pack(tmp_path / "a.rec"), open_image_files(folder)
    assert json.loads((tmp_path / "a.identities.json").read_text()) == ORDER
    assert len(files) == len(pack) == 13
    assert files.declared_identities == pack.num_identities == 4
    for image in range(13):
        identity, view = files.record(image)
        theirs, their_view = pack.record(image)
        assert (identity, view.tobytes()) == (theirs, their_view.tobytes())
    ids = np.array([12, 0, 3, 3])
    np.testing.assert_array_equal(files.identities(ids), pack.identities(ids))
    for image in (-1, 13):
        for method in (files.record, files.jpeg_view, lambda i: files.identities([0, i])):
            with pytest.raises(IndexError, match=rf"image {image} must be in \[0, 13\)"):
                method(image)


def test_a_list_is_what_the_pack_of_it_is(folder, tmp_path):
    """Its images are sorted by identity, and the order within one is the list's."""
    path = listed(folder)
    done = partialfc("pack", path, tmp_path / "a.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    pack, files = open_pack(tmp_path / "a.rec"), open_image_files(path)
    assert [files.jpeg(i) for i in range(13)] == [pack.jpeg(i) for i in range(13)]
    assert files.index.identity_N.tolist() == pack.identities(range(13)).tolist()
    assert {files.index.name(i).split("/")[1] for i in range(4)} == {"2"}


def test_a_list_is_sorted_in_pieces_and_may_be_a_link(folder, tmp_path, monkeypatch):
    """The paths of a link to a list begin where the link is."""
    expected = open_image_files(listed(folder))
    monkeypatch.setattr("partialfc.data.files.index._SORTED", 5)
    (tmp_path / "lists").mkdir()
    folder.with_name("list.txt").rename(tmp_path / "lists" / "all.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "lists" / "all.txt")
    files = open_image_files(tmp_path / "link.txt")
    assert [files.jpeg(i) for i in range(13)] == [expected.jpeg(i) for i in range(13)]


def test_identities_are_numbered_without_gaps_and_mixed_with_packs(folder, tmp_path):
    """No center without images; those of a folder follow the pack's before it."""
    (tmp_path / "list.txt").write_text("photos/9/0.jpg\t7000000\nphotos/9/1.jpg -3\n")
    files = open_image_files(tmp_path / "list.txt")
    assert (files.declared_identities, files.index.identity_N.tolist()) == (2, [0, 1])
    golden = FIXTURES / "records" / "insightface.rec"
    dataset = open_dataset([golden, folder, tmp_path / "list.txt"])
    assert dataset.num_identities == 12 + 4 + 2
    assert len(dataset.labels()) == len(dataset) == 60 + 13 + 2
    assert dataset.identities([59, 60, 72, 73]).tolist() == [11, 12, 15, 16]
    assert dataset.jpeg(60) == (folder / "2" / "0.jpg").read_bytes()


@pytest.mark.parametrize("loader", LOADERS)
def test_any_world_size_and_any_resume_see_the_same_images(folder, loader):
    """Sample ids, flips and shifts as integers at every position; pixels at some."""
    whole = [stream_of(folder, 12).batch(12 * step) for step in range(4)]
    for world_size in (1, 2, 3, 4):
        for step in range(4):
            parts = [
                stream_of(folder, 12, r, world_size).batch(12 * step) for r in range(world_size)
            ]
            for name in ("sample_id_B", "identity_B"):
                joined = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(whole[step], name))
            for name in ("flip_B", "shift_x_B", "shift_y_B"):
                joined = np.concatenate([getattr(part.draw, name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(whole[step].draw, name))
    straight = take(4, stream_of(folder, 12), loader=loader)
    resumed = take(2, stream_of(folder, 12, 1, 2), 24, loader=loader)
    for (images, identities, *_), (ours, our_identities, *_) in zip(
        straight[2:], resumed, strict=True
    ):
        assert torch.equal(images[6:], ours)
        assert torch.equal(identities[6:], our_identities)


@pytest.mark.parametrize("loader", LOADERS)
def test_png_of_every_kind_trains_on_the_pixels_that_are_stored(tmp_path, loader):
    """Both loaders, beside JPEG images in one batch: grey, palette, one bit, transparent."""
    pixels = lopsided(32, 32, 3)
    alpha = np.concatenate([pixels, 255 - pixels[:, :, :1]], 2)
    palette = Image.fromarray(pixels).quantize(16)
    kinds = {
        "rgb": png(pixels), "grey": png(pixels[:, :, 0]), "alpha": png(alpha),
        "grey alpha": png(alpha[:, :, 2:]), "one bit": png(pixels[:, :, 0] > 99),
        "jpeg": encoded(pixels),
    }  # fmt: skip
    file = io.BytesIO()
    palette.save(file, "PNG", bits=4, transparency=3)
    kinds["palette"] = file.getvalue()
    (tmp_path / "a").mkdir()
    for name, data in kinds.items():
        (tmp_path / "a" / f"{name}.{'jpg' if name == 'jpeg' else 'PNG'}").write_bytes(data)
    stream = stream_of(tmp_path, batch=len(kinds), size=32)
    [(images, _, replaced, *_)] = take(1, stream, loader=loader)
    assert not replaced
    encoded_batch = stream.batch(0)
    for i, view in enumerate(encoded_batch.jpegs):
        with Image.open(io.BytesIO(view.tobytes())) as image:
            expected = np.asarray(image.convert("RGB"))
        draws = encoded_batch.draw
        padded = np.pad(expected, ((2, 2), (2, 2), (0, 0)), mode="edge")
        top, left = 2 - draws.shift_y_B[i], 2 - draws.shift_x_B[i]
        moved = padded[top : top + 32, left : left + 32]
        moved = moved[:, ::-1] if draws.flip_B[i] else moved
        levels = images[i].numpy() * 127.5 + 127.5
        np.testing.assert_allclose(levels, moved.transpose(2, 0, 1), atol=1e-4)


def test_the_run_that_a_user_starts(folder, tmp_path):
    """From the folder alone, two steps; preflight and the report included."""
    words = [
        "configs/demo.toml", f"data.train={folder}", f"run.folder={tmp_path / 'run'}",
        "run.epochs=", "run.steps=2", "schedule.warmup_steps=0", "data.global_batch=8",
        "verification.pairs=[]", "verification.identification=[]", "verification.every_steps=0",
    ]  # fmt: skip
    done = python("launch/train.py", *words)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir())


# The kept index


def test_the_index_is_kept_mapped_and_made_again_when_the_folder_changes(folder, monkeypatch):
    """A file more, one fewer, one with another name: each is seen without listing all folders."""
    first = open_image_files(folder)
    kept = folder.with_name("photos.index")
    assert kept.exists()
    with monkeypatch.context() as patched:
        patched.setattr(
            "partialfc.data.files.index.list_folder", None
        )  # would be called without it
        again = open_image_files(folder)
    assert again.fingerprint == first.fingerprint
    assert not again.index.identity_N.flags.writeable
    assert pickle.loads(pickle.dumps(again)).fingerprint == first.fingerprint
    prints = [first.fingerprint]
    for change in (
        lambda: shutil.copy(folder / "9" / "0.jpg", folder / "9" / "7.jpg"),
        lambda: (folder / "9" / "7.jpg").unlink(),
        lambda: (folder / "9" / "4.jpg").rename(folder / "9" / "8.jpg"),
        lambda: shutil.copytree(folder / "9", folder / "11"),
    ):
        change()
        prints.append(open_image_files(folder).fingerprint)
    assert prints[2] == prints[0]
    assert len(set(prints)) == 4
    path = listed(folder)
    before = open_image_files(path).fingerprint
    path.write_text(path.read_text().replace("\t10\n", "\t12\n"))
    assert open_image_files(path).fingerprint != before


@pytest.mark.parametrize("damage", ["cut", "name", "header", "../secret.jpg", "a\0b.jpg", "/a.jpg"])
def test_a_damaged_or_forged_index_is_made_again_or_stays_inside(folder, damage, tmp_path):
    """Somebody may put an index with right times and any content beside a folder."""
    (tmp_path / "secret.jpg").write_bytes(encoded(lopsided(32, 32, 1)))
    first = open_image_files(folder)
    names = [first.index.name(i) for i in range(13)]
    kept = folder.with_name("photos.index")
    data = bytearray(kept.read_bytes())
    if damage == "cut":
        kept.write_bytes(data[:-1])
    elif damage == "header":
        kept.write_bytes(b'{"format": 7}'.ljust(4096) + data[4096:])
    elif damage == "name":
        data[-1] ^= 1
        kept.write_bytes(data)
    else:
        out = damage
        header = json.loads(data[:4096])
        header |= {"count": 1, "identities": 1, "names": len(out)}
        columns = struct.pack("<qqii", 0, len(out), 0, 9) + out.encode()
        digest = hashlib.blake2b(b"1", digest_size=8)
        digest.update(columns)
        header["fingerprint"] = digest.hexdigest()
        kept.write_bytes(json.dumps(header).encode().ljust(4096) + columns)
        with pytest.raises(RecordError, match="leads out of its folder"):
            open_image_files(folder).record(0)
        return
    again = open_image_files(folder)
    assert [again.index.name(i) for i in range(13)] == names


def test_a_read_only_folder_uses_the_users_cache(folder, tmp_path):
    """A real read-only mount, where this user may make one."""
    code = (
        "from partialfc.data.packs import index_cache; index_cache.KEPT_FROM = 1; import sys;"
        "from partialfc.data.files.image_files import open_image_files as o;"
        "print(len(o(sys.argv[1])))"
    )
    (tmp_path / "disk").mkdir()
    folder.rename(tmp_path / "disk" / "photos")
    disk = tmp_path / "disk"
    script = f'mount --bind {disk} {disk} && mount -o remount,ro,bind {disk} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, disk / "photos"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == "13\n", done.stderr
    assert [path.name for path in disk.iterdir()] == ["photos"]
    assert [path.suffix for path in (tmp_path / "cache" / "partialfc").iterdir()] == [".index"]


# Hostile and broken sources

BAD = {
    "link to a file": (lambda p: (p.unlink(), p.symlink_to(p.with_name("1.jpg"))), "symbolic link"),
    "empty": (lambda p: p.write_bytes(b""), "the file has 0 bytes"),
    "huge": (lambda p: os.truncate(p, MOST_BYTES + 1), f"must be in \\[1, {MOST_BYTES}\\]"),
    "gone": (lambda p: p.unlink(), "No such file"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    "pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
    "other folder": (
        lambda p: (p.parent.rename(p.parents[1] / "x"), p.parent.symlink_to("x")),
        "symbolic link",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("source", ["folder", "list"])
def test_a_file_that_goes_bad_behind_the_index_is_replaced_and_named(folder, kind, source):
    """It does not hang, follow a link or read gigabytes; its list leaves it out of the next run."""
    change, why = BAD[kind]
    path = folder if source == "folder" else listed(folder)
    stream = stream_of(path, batch=13)
    change(folder / "9" / "0.jpg")
    dataset = stream.dataset
    found = list(dataset.records(np.arange(13)))
    bad = [i for i, record in enumerate(found) if isinstance(record, str)]
    names = {dataset.packs[0].index.name(i) for i in bad}
    inside = "" if source == "folder" else "photos/"
    expected = {f"{inside}9/{n}.jpg" for n in range(5 if kind == "other folder" else 1)}
    assert names == expected
    with pytest.raises(RecordError, match=why):
        dataset.jpeg(bad[0])
    encoded_batch = stream.batch(0)
    assert sorted(one.sample_id for one in encoded_batch.replaced) == bad
    text = str(encoded_batch.replaced[0].bad)
    assert text.startswith(f"image {encoded_batch.replaced[0].sample_id}, {inside}9/")
    skip = folder.with_name("skip.jsonl")
    write_skip_list(skip, [(one.pack, one.bad) for one in encoded_batch.replaced])
    assert json.loads(skip.read_text().splitlines()[0])["file"].startswith(f"{inside}9/")


def test_listed_bad_images_are_left_out(folder):
    (folder / "9" / "0.jpg").write_bytes(b"no image")
    (encoded_batch,) = [stream_of(folder, batch=13).batch(0)]
    skip = folder.with_name("skip.jsonl")
    write_skip_list(skip, [(one.pack, one.bad) for one in encoded_batch.replaced])
    dataset = open_dataset([folder], [skip])
    assert (len(dataset), dataset.num_identities) == (12, 4)
    assert all(not isinstance(record, str) for record in dataset.records(np.arange(12)))


def test_a_name_that_no_terminal_or_json_can_take_is_printed_all_the_same(tmp_path):
    """Else one file name ends a run of days, or moves the cursor of who reads its log."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    names = [b"\xff\xfe.jpg", b"\x1b[2Jline\n.jpg", "зоя.jpg".encode()]
    for name in names:
        (tmp_path / "photos" / "a").joinpath(os.fsdecode(name)).write_bytes(b"x")
    (tmp_path / "photos" / "a" / "good.jpg").write_bytes(encoded(lopsided(112, 112, 1)))
    stream = stream_of(tmp_path / "photos", batch=4)
    replaced = stream.batch(0).replaced
    write_skip_list(tmp_path / "skip", [(one.pack, one.bad) for one in replaced])
    text = (tmp_path / "skip").read_text()
    assert len(text.splitlines()) == 3
    assert "зоя.jpg" in text
    assert "\x1b" not in text + str(replaced)
    assert len(open_dataset([tmp_path / "photos"], [tmp_path / "skip"])) == 1


LISTS = {
    "no identity": ("photos/9/0.jpg\n", "line 1: .* must be the path of an image, a tab"),
    "no path": ("\t3\n", "line 1: .*must be the path"),
    "absolute": ("photos/9/0.jpg\t1\n/etc/passwd\t2\n", "line 2: path '/etc/passwd' must lead to"),
    "up": ("photos/../../a.jpg\t1\n", "line 1: path .*it may not begin with / or have .. in it"),
    "zero": ("photos/\0.jpg\t1\n", "line 1: path"),
    "long label": ("a.jpg\t" + "9" * 300 + "\n", "line 1: .*must be the path"),
    "no end of line": ("x" * 100_000, "line 1: .*must be the path"),
    "nothing": ("", "holds no images"),
    "mixed": ("0\t1.0\ta.jpg\na.jpg\t1\n", "line 2: .*must be number, label and path"),
    "half a label": ("1\ta.jpg\t1\n1\tb.jpg\t1.5\n", "line 2: .* as insightface's lists are"),
    "mxnet up": ("0\t1.0\t../a.jpg\n", "line 1: path .*it may not begin with / or have .. in it"),
    "twice names": ("path identity\npath identity\n", "none is a regular file"),
    "not there": (
        "a.jpg\t1\nb.jpg\t2\n",
        "of 2 images the first is 'a.jpg', and none is a regular",
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_that_breaks_a_rule_is_one_message_with_its_line(folder, kind):
    text, message = LISTS[kind]
    path = folder.with_name("list.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_image_files(path)


WRITTEN = {
    "bom": "\ufeff{}",
    "names of columns": "path\tidentity\n{}",
    "bom and names": "\ufeffimage label\n\n{}",
    "windows": "{}\n   \n",
    "mxnet": None,
    "insightface": None,
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_lists_as_other_programs_write_them_are_read(folder, kind):
    path = listed(folder)
    own = path.read_text()
    expected = [images_of(path), open_image_files(path).index.identity_N.tolist()]
    lines = [line.rpartition("\t") for line in own.splitlines()]
    number = [(name, int(label)) for name, _, label in lines]
    if kind == "mxnet":
        text = "".join(f"{i}\t{n}.000000\t{name}\n" for i, (name, n) in enumerate(number))
    elif kind == "insightface":
        text = "".join(f"1\t{name}\t{n}\t3\t4\n" for name, n in number)
    else:
        text = WRITTEN[kind].format(own)
    path.write_bytes(text.replace("\n", "\r\n" if kind == "windows" else "\n").encode())
    assert [images_of(path), open_image_files(path).index.identity_N.tolist()] == expected


def images_of(path):
    files = open_image_files(path)
    return [files.jpeg(i) for i in range(len(files))]


def test_folders_that_hold_no_identities_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no folders, must hold one per identity"):
        open_image_files(tmp_path / "empty")
    (tmp_path / "empty" / "a").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_image_files(tmp_path / "empty")
    with pytest.raises(OSError, match="none"):
        open_image_files(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must be a .rec, a folder of folders or a list"):
        open_image_files("/dev/zero")
    (folder / "link").symlink_to(folder / "9")
    with pytest.raises(ValueError, match="'link' is a symbolic link, which is not followed"):
        open_image_files(folder)


def test_other_files_are_left_out_with_a_warning(folder):
    """No image is left out silently; hidden files are other programs' notes."""
    (folder / "9" / "notes.txt").write_text("x")
    (folder / "9" / "photo.heic").write_text("x")
    (folder / "9" / ".thumbs.jpg").write_text("x")
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(folder / "2", folder / name)
    with pytest.warns(UserWarning, match=r"2 files and folders .* are no images .*left out"):
        assert len(open_image_files(folder)) == 13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_image_files(folder)) == 13


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width, height, bits=8, colour=2, *, body=b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


PNGS = {
    "bomb": (
        raw_png(65500, 65500),
        f"65500 x 65500 pixels, must be between 1 and {MOST_WHOLE_PIXELS}",
    ),
    "no pixels": (raw_png(0, 5), "0 x 5 pixels"),
    "32 bits": (raw_png(8, 8, bits=32), "32 bits per sample"),
    "colour": (raw_png(8, 8, colour=5), "colour type 5"),
    "cut": (raw_png(8, 8)[:-12], "truncated: it has no end marker"),
    "signature": (b"\x89PNG\r\n\x1a\n", "truncated"),
    "no header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"0" * 13) + chunk(b"IEND", b""), "begin"),
    "chunks": (raw_png(8, 8, body=chunk(b"tEXt", b"") * 20_000), "more than 16384 chunks"),
    "length": (raw_png(8, 8, body=b"\xff\xff\xff\xffIDAT"), "truncated"),
    "checksum": (
        raw_png(8, 8, body=chunk(b"tEXt", b"a\0b")[:-1] + b"\0"),
        "checksum of its b'tEXt'",
    ),
    "unknown": (raw_png(8, 8, body=chunk(b"ABCD", b"")), "b'ABCD' that is not in the standard"),
    "no palette": (raw_png(8, 8, colour=3, body=chunk(b"IDAT", b"")), "no palette before"),
    "two headers": (raw_png(8, 8, body=raw_png(11000, 11000)[8:33]), "a second header"),
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_that_is_not_decoded_is_refused_from_its_headers(kind):
    data, message = PNGS[kind]
    with pytest.raises(ValueError, match=message):
        check_image(np.frombuffer(data, np.uint8))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_png_is_an_image_or_a_value_error(data):
    """Nothing else comes out of the check and the decoder, whatever the bytes."""
    good = bytearray(png(lopsided(16, 16, data.draw(st.integers(0, 3)))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    is_image_or_value_error(bytes(good))


KINDS = [b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt", b"eXIf", b"IDAT"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_png_with_odd_chunks_is_an_image_or_a_value_error(data):
    """Their checksums are right, so a decoder looks at them."""
    palette = Image.fromarray(lopsided(16, 16, 1)).quantize(16)
    good = png(lopsided(16, 16, 1)) if data.draw(st.booleans()) else png(np.asarray(palette))
    at, chunks = 8, []
    while at < len(good):
        length, kind = struct.unpack_from(">I4s", good, at)
        chunks.append((kind, good[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(data.draw(st.integers(1, 3))):
        odd = (data.draw(st.sampled_from(KINDS)), data.draw(st.binary(max_size=30)))
        at = data.draw(st.integers(1, len(chunks)))
        chunks[at : at + data.draw(st.integers(0, 1))] = [odd]
    is_image_or_value_error(good[:8] + b"".join(chunk(*one) for one in chunks))


def test_whatever_a_decoder_raises_of_a_png_is_a_value_error():
    """A run leaves the image out, and does not end: of a profile of no bytes, an IndexError."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    data = raw_png(8, 8, colour=0, body=pixels + chunk(b"iCCP", b""))
    view = np.frombuffer(data, np.uint8)
    check_image(view)
    with pytest.raises(ValueError, match="IndexError: "):
        decode_image(view)


def is_image_or_value_error(data: bytes) -> None:
    view = np.frombuffer(data, np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of an odd animation
            frame = check_image(view)
            pixels = decode_image(view)
    except ValueError:
        return
    assert pixels.shape == (frame.height, frame.width, 3)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_list_are_a_list_or_a_value_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        names, (files,) = read_list(path)
    except ValueError:
        return
    assert len(files.identity_N) == len(files.size_N) == len(files.length_N)
    assert sum(files.length_N) == len(files.names)
    assert max(files.identity_N, default=-1) == len(names) - 1
