"""partialfc pack, show and augment as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import augment
from partialfc.data.images.jpeg import decode, encode
from partialfc.data.packs.pack import open_pack
from tests.support.places import FIXTURES, ROOT
from tests.support.processes import partialfc
from tools._faces.packs import render

GOLDEN = FIXTURES / "records" / "insightface.rec"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three people with 4, 3 and 1 images, in other sizes and formats too, and a stray file."""
    folder = tmp_path_factory.mktemp("source")
    for identity, (name, count) in enumerate([("ann", 4), ("bob", 3), ("zoe", 1)]):
        (folder / name).mkdir()
        images = render(np.full(count, identity), np.arange(count), seed=1)
        for number, pixels in enumerate(images):
            (folder / name / f"{number}.jpg").write_bytes(encode(pixels))
    Image.fromarray(render(np.array([1]), np.array([9]), seed=1, size=200)[0]).save(
        folder / "bob" / "large.png"
    )
    (folder / "readme.txt").write_text("not an image")
    return folder


def test_a_folder_becomes_a_pack(source, tmp_path):
    done = partialfc("pack", source, tmp_path / "packs" / "a.rec", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pack = open_pack(tmp_path / "packs" / "a.rec")
    assert pack.identities(np.arange(9)).tolist() == [0] * 4 + [1] * 4 + [2]
    assert json.loads((tmp_path / "packs" / "a.identities.json").read_text()) == [
        "ann",
        "bob",
        "zoe",
    ]
    assert pack.jpeg(0) == (source / "ann" / "0.jpg").read_bytes(), "stored byte for byte"
    large = decode(pack.jpeg_view(7))
    assert large.shape == (112, 112, 3)
    truth = render(np.array([1]), np.array([9]), seed=1, size=112)[0]
    assert np.abs(large.astype(int) - truth).mean() < 12
    assert not (tmp_path / "packs" / "a.parts").exists()


def write_table(path, rows, structs):
    """Rows of (image bytes, label) in row groups of two, as datasets writes them."""
    arrow = pytest.importorskip("pyarrow", reason="pip install 'partialfc[search]'")
    import pyarrow.parquet as parquet

    images = [{"bytes": data, "path": "x"} if structs else data for data, _ in rows]
    labels = arrow.array([label for _, label in rows])
    labels = labels if structs else labels.dictionary_encode()  # pandas' categories
    columns = {"image": images, "label": labels, "width": [112] * len(rows)}
    parquet.write_table(arrow.table(columns), path, row_group_size=2)


@pytest.mark.parametrize("structs", [True, False])
def test_parquet_becomes_the_pack_that_the_folder_becomes(source, tmp_path, structs):
    """Its rows are in any order, in several files and row groups, and labels are text."""
    rows = [(path.read_bytes(), path.parent.name) for path in sorted(source.glob("*/*"))]
    mixed = [rows[i] for i in (8, 4, 0, 5, 1, 6, 2, 3, 7)]  # each identity's in their order
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "0.parquet", mixed[:5], structs)
    write_table(tmp_path / "tables" / "1.parquet", mixed[5:], structs)
    for name, words in (("a", [tmp_path / "tables"]), ("b", [source])):
        done = partialfc("pack", *words, tmp_path / f"{name}.rec", "--workers", 2)
        assert done.returncode == 0, done.stderr
    for suffix in (".rec", ".idx", ".identities.json"):
        one, two = ((tmp_path / f"{n}{suffix}").read_bytes() for n in "ab")
        assert one == two, suffix


def test_parquet_with_anything_wrong_in_it_is_named(source, tmp_path):
    jpeg = (source / "zoe" / "0.jpg").read_bytes()
    write_table(
        tmp_path / "a.parquet", [(jpeg, "x"), (None, "x"), (jpeg, None), (b"no", "y")], True
    )
    done = partialfc("pack", tmp_path / "a.parquet", tmp_path / "a.rec", "--workers", 1)
    assert done.returncode == 2
    for problem in ("a.parquet:0:1: ValueError: the row has no bytes", "a.parquet:1:0: the row has "
                    "no identity", "a.parquet:1:1: ValueError: it is no image"):  # fmt: skip
        assert problem in done.stderr
    done = partialfc("pack", tmp_path / "a.parquet", tmp_path / "a.rec", "--skip-broken")
    assert done.returncode == 0, done.stderr
    assert len(open_pack(tmp_path / "a.rec")) == 1
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    write_table(tmp_path / "c.parquet", [("text", "x")], False)
    write_table(tmp_path / "d.parquet", [(jpeg, 1.5)], True)  # not the identities of its widths
    column = "must have one column of images"
    for name, message in (("b", "b.parquet: "), ("c", column), ("d", column)):
        done = partialfc("pack", tmp_path / f"{name}.parquet", tmp_path / f"{name}.rec")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_workers_do_not_change_a_byte(source, tmp_path):
    for workers in (1, 2):
        done = partialfc("pack", source, tmp_path / f"{workers}.rec", "--workers", workers)
        assert done.returncode == 0, done.stderr
    for suffix in (".rec", ".idx", ".identities.json"):
        one, two = ((tmp_path / f"{n}{suffix}").read_bytes() for n in (1, 2))
        assert one == two


def test_broken_images_are_named_and_refused_or_skipped(source, tmp_path):
    broken = tmp_path / "broken"
    for path in source.glob("*/*"):
        (broken / path.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / path.parent.name / path.name).write_bytes(path.read_bytes())
    whole = (broken / "ann" / "1.jpg").read_bytes()
    (broken / "ann" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "zoe" / "0.jpg").write_bytes(b"no image at all")
    done = partialfc("pack", broken, tmp_path / "a.rec")
    assert done.returncode == 2
    assert "ann/1.jpg" in done.stderr
    assert "zoe/0.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a.rec").exists()
    done = partialfc("pack", broken, tmp_path / "a.rec", "--skip-broken")
    assert done.returncode == 0, done.stderr
    pack = open_pack(tmp_path / "a.rec")
    assert (len(pack), pack.num_identities) == (7, 2)


def test_kill_9_and_the_same_command_give_the_same_bytes(tmp_path):
    """Enough images for several pieces of work; the finished ones are not done again."""
    source = tmp_path / "many"
    pixels = render(np.zeros(1, np.int64), np.zeros(1, np.int64), seed=1, size=140)[0]
    for identity in range(60):
        (source / f"{identity:03d}").mkdir(parents=True)
        jpeg = encode(np.roll(pixels, identity, axis=1))
        for number in range(50):
            (source / f"{identity:03d}" / f"{number}.jpg").write_bytes(jpeg)
    words = [sys.executable, "-m", "partialfc", "pack", str(source)]
    done = partialfc("pack", source, tmp_path / "straight.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*words, str(tmp_path / "killed.rec"), "--workers", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    parts = tmp_path / "killed.parts"
    deadline = time.monotonic() + 60
    while not list(parts.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.rec").exists(), "it was killed before its end"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    first = min(finished)
    done = partialfc("pack", source, tmp_path / "killed.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert first.name == "000000.json"
    straight, killed = ((tmp_path / f"{n}.rec").read_bytes() for n in ("straight", "killed"))
    assert straight == killed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "a.rec"], "missing is not a folder"),
        (["SOURCE", "a.bin"], "must end with .rec"),
        (["SOURCE", "a.rec", "--quality", "0"], "--quality must be in"),
    ],
)
def test_mistakes_are_one_message(words, message, source, tmp_path):
    words = [str(source) if word == "SOURCE" else word for word in words]
    done = partialfc("pack", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_show_counts_and_draws(tmp_path):
    done = partialfc("show", GOLDEN, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60" in done.stdout
    assert "12" in done.stdout
    for name in ("labels.png", "faces.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    done = partialfc("show", tmp_path / "none.rec")
    assert done.returncode == 2
    assert "none.rec" in done.stderr


@pytest.mark.parametrize("words", [[], ["--each"]])
def test_what_training_sees_is_drawn(words, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    overrides = ["verification.pairs=[]", "verification.every_steps=0", "data.shift=4"]
    start = [str(ROOT / "configs" / "demo.toml"), "--out", str(out), *words, *overrides]
    assert augment.main([*start, f"data.train={GOLDEN}"]) == 0
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert main(["augment", *start, "data.train=none.rec"]) == 2
    assert "none.rec" in capsys.readouterr().err
