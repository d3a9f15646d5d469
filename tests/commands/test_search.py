"""From photos to names: embed, write, read, search, compare, calibrate."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.__main__ import main
from partialfc.alignment.crop import TEMPLATE
from partialfc.backbones import build_backbone
from partialfc.commands import embed, search
from partialfc.commands._embed.files import Embeddings, read_embeddings, write_embeddings
from partialfc.data.names import names_path
from tests.support.images import face
from tests.support.processes import python

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")
SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.manual_seed(0)
    torch.save(build_backbone("convnet_s", embedding_dim=32, image_size=SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for person in range(3):
        (folder / f"p{person}").mkdir()
        for image in range(2):
            name = f"p{person}/{image}.{'jpg' if image else 'PNG'}"
            Image.fromarray(face(person, image)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(model, images, out, *words):
    return main(
        ["embed", str(model), str(images), "--out", str(out), f"--image-size={SIZE}", *words]
    )


def test_photos_become_embeddings_by_name(model, photos, tmp_path):
    """The same rows in both formats, in the order of the names, as the backbone makes them."""
    for name in ("a.npy", "a.parquet"):
        assert run(model, photos, tmp_path / name) == 0
    one, other = read_embeddings(tmp_path / "a.npy"), read_embeddings(tmp_path / "a.parquet")
    assert one.names == other.names == [f"p{p}/{i}" for p in range(3) for i in ("0.PNG", "1.jpg")]
    assert one.identities == other.identities == [f"p{p}" for p in range(3) for _ in range(2)]
    assert np.array_equal(one.rows_ND, other.rows_ND)
    assert one.rows_ND.shape == (6, 32)
    assert len(np.unique(one.rows_ND, axis=0)) == 6


def test_images_of_a_pack_are_of_people_by_name(model, photos, tmp_path):
    """So that search says who somebody is; the pack of somebody else has numbers alone."""
    pack = tmp_path / "people.rec"
    assert main(["pack", str(photos), str(pack), "--workers", "1"]) == 0
    for expected in ([f"p{p}" for p in range(3)], ["0", "1", "2"]):
        assert run(model, pack, tmp_path / "a.npy") == 0
        assert read_embeddings(tmp_path / "a.npy").identities[::2] == expected
        names_path(pack).unlink(missing_ok=True)


def test_landmarks_align_a_photo(model, photos, tmp_path):
    """A face at its place in a larger photo gives the embedding of the cut-out one."""
    wide = tmp_path / "wide" / "p0"
    wide.mkdir(parents=True)
    canvas = np.zeros((200, 300, 3), np.uint8)
    canvas[40:152, 90:202] = face(0, 0)
    Image.fromarray(canvas).save(wide / "a photo.png")
    moved = TEMPLATE + np.array([90, 40])
    points = " ".join(map(str, moved.ravel()))
    (tmp_path / "points.txt").write_text(f"p0/a photo.png {points}\n")
    words = ["--landmarks", str(tmp_path / "points.txt")]
    assert run(model, wide.parent, tmp_path / "wide.npy", *words) == 0
    whole = run(model, wide.parent, tmp_path / "whole.npy")
    assert whole == 0
    assert run(model, photos, tmp_path / "cut.npy") == 0
    aligned, resized = (read_embeddings(tmp_path / n).rows_ND[0] for n in ("wide.npy", "whole.npy"))
    cut = read_embeddings(tmp_path / "cut.npy").rows_ND[0]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(aligned, cut) > 0.999
    assert cosine(aligned, cut) > cosine(resized, cut)


def test_a_photo_that_cannot_be_used_is_listed_and_the_rest_is_embedded(
    model, photos, tmp_path, capsys
):
    """Also what is called otherwise than it is, lies sideways or is too large for a loader."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    upright = Image.open(folder / "p0" / "0.PNG")
    sideways, block = upright.rotate(90), Image.Exif()
    block[0x0112] = 6
    sideways.save(folder / "p0" / "sideways.png", exif=block)
    upright.save(folder / "p0" / "really_webp.jpg", "WEBP", lossless=True)
    upright.resize((2400, 1800)).save(folder / "p0" / "large.jpg")
    (folder / "p1" / "empty.jpg").write_bytes(b"")
    (folder / "p1" / "cut.jpg").write_bytes((folder / "p1" / "1.jpg").read_bytes()[:-700])
    os.mkfifo(folder / "p1" / "pipe.jpg")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(folder / "p2", folder / hidden)
    (folder / "p2" / "._1.jpg").write_bytes(b"\0\5\x16\7")
    out, bad = tmp_path / "a.npy", tmp_path / "bad.jsonl"
    assert run(model, folder, out, "--bad", str(bad)) == 1
    found = read_embeddings(out)
    row = dict(zip(found.names, found.rows_ND, strict=True))
    assert sorted(row) == [
        "p0/0.PNG", "p0/1.jpg", "p0/large.jpg", "p0/really_webp.jpg", "p0/sideways.png",
        "p1/0.PNG", "p1/1.jpg", "p2/0.PNG", "p2/1.jpg",
    ]  # fmt: skip
    assert found.identities == [name[:2] for name in found.names]
    for name in ("sideways.png", "really_webp.jpg"):
        assert np.array_equal(row[f"p0/{name}"], row["p0/0.PNG"])
    lines = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [line["file"] for line in lines] == ["p1/cut.jpg", "p1/empty.jpg", "p1/pipe.jpg"]
    said = capsys.readouterr().err
    assert "left out: p1/cut.jpg: the JPEG is truncated" in said
    assert "1 that are no images by their names were left out: .txt 1" in said
    words = ["embed", model, folder, "--out", tmp_path / "two.npy", f"--image-size={SIZE}"]
    done = python("-m", "partialfc", *words, "--device", "cpu", ranks=2)
    assert done.returncode == 1, done.stderr
    assert np.array_equal(read_embeddings(tmp_path / "two.npy").rows_ND, found.rows_ND)
    good = run(model, photos, tmp_path / "good.npy", "--bad", str(bad))
    assert (good, bad.read_text()) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--landmarks", "POINTS"], "no points of p0/0.PNG, and of 5 others"),
        (["--landmarks", "BROKEN"], "line 1: must be a name and ten numbers"),
    ],
)
def test_landmarks_that_are_missing_or_broken_are_named(
    model, photos, tmp_path, words, message, capsys
):
    (tmp_path / "POINTS").write_text("other.jpg 1 2 3 4 5 6 7 8 9 10\n")
    (tmp_path / "BROKEN").write_text("p0/0.PNG 1 2 3\n")
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    assert run(model, photos, tmp_path / "a.npy", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.npy").exists()


def stored(path, rows, identities=None):
    rows = np.asarray(rows, np.float32)
    names = [f"{path.stem}{i}" for i in range(len(rows))]
    write_embeddings(path, Embeddings(names, identities or [""] * len(rows), rows))
    return str(path)


def results(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_search_finds_the_nearest_by_hand(tmp_path, capsys):
    """Lengths do not count; below the threshold a query is nobody's."""
    gallery = stored(tmp_path / "g.npy", [[5, 0], [0, 0.1], [1, 1]], ["ann", "bob", "cec"])
    queries = stored(tmp_path / "q.npy", [[2, 1.9], [-1, 0.2]])
    out = tmp_path / "found.csv"
    words = [gallery, queries, "--top", "2", "--threshold", "0.9", "--out", str(out)]
    assert search.main(words) == 0
    rows = results(out)
    assert [(r["query"], r["rank"], r["identity"], r["accepted"]) for r in rows] == [
        ("q0", "1", "cec", "1"), ("q0", "2", "ann", "0"), ("q1", "1", "bob", "0"),
        ("q1", "2", "cec", "0"),
    ]  # fmt: skip
    assert float(rows[0]["cosine"]) == pytest.approx(3.9 / (2**0.5 * (4 + 1.9**2) ** 0.5), abs=1e-6)
    assert "1 of 2 queries have a score above 0.9000" in capsys.readouterr().out


def test_pairs_are_compared_row_by_row(tmp_path, capsys):
    left = stored(tmp_path / "l.npy", [[1, 0], [1, 0]])
    right = stored(tmp_path / "r.npy", [[3, 0], [0, 1]])
    words = [left, right, "--pairs", "--threshold", "0.5", "--out", str(tmp_path / "o.csv")]
    assert search.main(words) == 0
    assert [row["accepted"] for row in results(tmp_path / "o.csv")] == ["1", "0"]
    short = stored(tmp_path / "s.npy", [[3, 0]])
    assert main(["search", left, short, "--pairs", "--threshold", "0.5"]) == 2
    assert "2 rows and 1; must be equal" in capsys.readouterr().err


def test_without_a_threshold_search_gives_nearest_neighbours(tmp_path, capsys):
    """It was refused, and whoever wanted neighbours had to invent a threshold."""
    gallery = stored(tmp_path / "g.npy", [[5, 0], [0, 0.1]], ["ann", "bob"])
    queries = stored(tmp_path / "q.npy", [[2, 1.9]])
    assert search.main([gallery, queries, "--top", "2", "--out", str(tmp_path / "o.csv")]) == 0
    rows = results(tmp_path / "o.csv")
    assert [row["identity"] for row in rows] == ["ann", "bob"]
    assert "accepted" not in rows[0], "nothing said which are the same person"
    said = capsys.readouterr().out
    assert "Nearest neighbours" in said
    assert "yes" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "1.57"], "1.57: must be a cosine, in [-1, 1]; a squared distance d has"),
        (["--threshold", "nan"], "nan: must be a cosine"),
        (["--threshold", "0.3", "--calibrate", "x.npy"], "give one of them"),
        (["--far", "1e-3"], "--far: needs --calibrate"),
        (["--pairs", "--top", "3"], "--top: not with --pairs"),
    ],
)
def test_what_is_no_cosine_or_would_be_ignored_is_refused(tmp_path, words, message, capsys):
    gallery = stored(tmp_path / "g.npy", [[5, 0], [0, 0.1]])
    with pytest.raises(SystemExit) as end:
        search.main([gallery, gallery, *words])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_threshold_of_a_false_accept_rate(tmp_path, capsys):
    """Counted again over the matrix: as many impostor pairs as the rate allows, no more."""
    generator = np.random.default_rng(0)
    rows, identity = generator.normal(size=(300, 16)), generator.integers(0, 60, 300)
    known = stored(tmp_path / "k.npy", rows, [f"p{i}" for i in identity])
    threshold = search.calibrated(read_embeddings(tmp_path / "k.npy"), 1e-3)
    unit = rows.astype(np.float32) / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    upper = np.triu_indices(300, 1)
    scores, same = (unit @ unit.T)[upper], (identity[:, None] == identity)[upper]
    assert (scores[~same] > threshold + 1e-6).sum() == int(1e-3 * (~same).sum())
    words = [known, known, "--calibrate", known]
    assert main(["search", *words, "--far", "1e-6"]) == 2
    assert "at least 1,000,000 are needed" in capsys.readouterr().err
    assert search.main([*words, "--far", "1e-3"]) == 0
    assert f"threshold {threshold:.6f}" in capsys.readouterr().out


def test_files_that_are_not_embeddings_are_refused(tmp_path, capsys):
    good = stored(tmp_path / "g.npy", [[1, 0]])
    wide = stored(tmp_path / "w.npy", [[1, 0, 0]])
    assert main(["search", good, wide, "--threshold", "0"]) == 2
    assert "both must be of one model" in capsys.readouterr().err
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("b.parquet", "o.npy", "g.txt"):
        assert main(["search", good, str(tmp_path / name), "--threshold", "0"]) == 2
    assert main(["search", good, str(tmp_path / "none.parquet"), "--threshold", "0"]) == 2
    assert "none.parquet: No such file or directory" in capsys.readouterr().err


def test_a_missing_package_is_named_before_images_are_embedded(
    model, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(embed, "embed_images", None)
    assert run(model, photos, tmp_path / "a.parquet") == 2
    assert "pyarrow is not installed: pip install" in capsys.readouterr().err
    assert run(model, tmp_path / "none", tmp_path / "a.npy", "--landmarks", "none.txt") == 2
