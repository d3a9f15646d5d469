"""partialfc pack, show and augment as a user runs them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import augment
from partialfc.commands._pack.sources import open_source, read
from partialfc.commands._pack.survey import Survey
from partialfc.commands._pack.tars import tar_images
from partialfc.data.images.jpeg import decode, encode
from partialfc.data.packs.pack import open_pack
from tests.support.places import FIXTURES, ROOT
from tests.support.processes import partialfc
from tests.support.waiting import wait_for
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
    assert done.returncode == 1
    for problem in ("a.parquet:0:1: the row has no bytes", "a.parquet:1:0: the row has no identity",
                    "a.parquet:1:1: it is no image"):  # fmt: skip
        assert problem in done.stderr
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


def test_broken_images_are_listed_and_the_rest_is_packed(source, tmp_path):
    broken = tmp_path / "broken"
    for path in source.glob("*/*"):
        (broken / path.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / path.parent.name / path.name).write_bytes(path.read_bytes())
    whole = (broken / "ann" / "1.jpg").read_bytes()
    (broken / "ann" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "zoe" / "0.jpg").write_bytes(b"no image at all")
    os.mkfifo(broken / "bob" / "pipe.jpg")
    (broken / "bob" / "a.heic").write_bytes(b"")
    words = ["pack", broken, tmp_path / "a.rec", "--workers", 1, "--bad", tmp_path / "bad.jsonl"]
    done = partialfc(*words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1 that are no images by their names were left out: .heic 1" in done.stderr
    pack = open_pack(tmp_path / "a.rec")
    assert (len(pack), pack.num_identities) == (7, 2)
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["file"] for line in bad] == ["ann/1.jpg", "bob/pipe.jpg", "zoe/0.jpg"]
    for line, why in zip(bad, ("truncated", "it is no file", "it is no image"), strict=True):
        assert why in line["problem"]
        assert f"{line['file']}: " in done.stderr
    (tmp_path / "a.rec").unlink()
    assert partialfc(*words, "--skip-broken").returncode == 0


NEVER_ENDS = """
import sys, time
from partialfc.commands import pack
from partialfc.__main__ import main
pack.stored_images = lambda *words: time.sleep(1e6)
sys.exit(main(sys.argv[1:]))
"""
"""All pieces, and then it does not come to its end before it is killed."""


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_the_same_bytes(tmp_path):
    """Enough images for several pieces of work; the finished ones are not done again."""
    source = tmp_path / "many"
    pixels = render(np.zeros(1, np.int64), np.zeros(1, np.int64), seed=1, size=140)[0]
    for identity in range(60):
        (source / f"{identity:03d}").mkdir(parents=True)
        jpeg = encode(np.roll(pixels, identity, axis=1))
        for number in range(50):
            (source / f"{identity:03d}" / f"{number}.jpg").write_bytes(jpeg)
    words = [sys.executable, "-c", NEVER_ENDS, "pack", str(source)]
    done = partialfc("pack", source, tmp_path / "straight.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*words, str(tmp_path / "killed.rec"), "--workers", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    parts = tmp_path / "killed.parts"
    wait_for(lambda: list(parts.glob("*.json")))
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


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def listed(tmp_path, *shards):
    """What is found in the shards: images of each identity as bytes, and the survey."""
    survey = Survey()
    found = tar_images([tmp_path / name for name in shards], survey)
    return {
        who: [read(tmp_path, place) for place in places] for who, places in found.items()
    }, survey


def test_no_image_of_a_tar_is_lost_and_nobody_is_somebody_else(tmp_path):
    """Two images of one stem, dots in the names of samples and people, notes of other programs."""
    shard(tmp_path / "a.tar", [
        ("ann/1.jpg", b"1"), ("ann/1.png", b"2"), ("ann/one.two.jpg", b"3"), ("ann/one.jpg", b"4"),
        ("J.R./0.jpg", b"5"), ("J.R/0.jpg", b"6"), ("./J.R./1.jpg", b"7"),
        ("0001.face.jpg", b"8"), ("0001.cls", b"zoe\n"), ("a.b.png", b"9"), ("a.b.cls", b"zoe"),
        ("ann/._1.jpg", b"x"), ("__MACOSX/ann/1.jpg", b"x"), (".cache/1.jpg", b"x"),
        ("ann/1.txt", b"x"), ("lost.jpg", b"x"),
    ])  # fmt: skip
    found, survey = listed(tmp_path, "a.tar")
    assert found == {
        "ann": [b"1", b"2", b"3", b"4"], "J.R.": [b"5", b"7"], "J.R": [b"6"], "zoe": [b"8", b"9"],
    }  # fmt: skip
    assert survey.ignored == {"hidden": 3, ".txt": 1}
    assert survey.faults == [("a.tar: lost.jpg", "no .cls beside it, and in no folder")]


def test_a_tar_that_is_cut_is_named_with_its_byte(tmp_path):
    """In a file, in a header or between them; tarfile ends at most of these without a word."""
    shard(tmp_path / "a.tar", [(f"ann/{number}.jpg", b"x" * 3000) for number in range(4)])
    whole = (tmp_path / "a.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[3584 + 20] ^= 1
    cases = {
        "file": (whole[:5000], 1, "byte 5000 of 5000: unexpected end of data"),
        "header": (whole[: 2 * 3584 + 100], 2, "byte 7168 of 7268: neither a file nor an end mark"),
        "between": (whole[: 2 * 3584], 2, "byte 7168 of 7168: neither"),
        "damaged": (bytes(damaged), 1, "byte 3584 of 20480: neither"),
        "two": (whole + whole, 4, "byte 14336 of 40960: more follows the end mark"),
        "none": (b"no tar at all" * 99, 0, "It must be a tar that is not compressed"),
        "whole": (whole, 4, ""),
    }
    for name, (data, images, why) in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        found, survey = listed(tmp_path, f"{name}.tar")
        assert len(found.get("ann", [])) == images, name
        assert [why in fault.why for fault in survey.faults] == [True] * bool(why), (name, survey)


def test_a_list_of_pack_leads_nowhere_outside(tmp_path):
    """As that of training: whoever packs a list that he has downloaded packs nothing else."""
    (tmp_path / "out.jpg").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    for path in ("../out.jpg", str(tmp_path / "out.jpg")):
        (tmp_path / "below").mkdir(exist_ok=True)
        (tmp_path / "below" / "list.txt").write_text(f"{path}\t0\n")
        with pytest.raises(ValueError, match=r"line 1: .* must lead to a file below"):
            open_source(tmp_path / "below" / "list.txt", Survey())
    with pytest.raises(ValueError, match=r"is not a folder, a .tar"):
        open_source(Path("/dev/zero"), Survey())


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


@pytest.mark.parametrize("path", ["/dev/zero", "../a.jpg", "photos/../../a.jpg"])
def test_a_list_that_leads_out_of_its_folder_is_refused_as_in_training(path, tmp_path):
    (tmp_path / "list.txt").write_text(f"{path}\t1\n")
    with pytest.raises(ValueError, match=r"line 1: path .* must lead to a file below"):
        open_source(tmp_path / "list.txt", Survey())
