"""partialfc cluster: k-means beside a plain program, labels by image, and what a kill leaves."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from partialfc.__main__ import main
from partialfc.commands._cluster import assignment, kmeans
from partialfc.commands._cluster.rows import Rows
from partialfc.data.vectors import Origin, write_origin
from tests.support.processes import python

pytest.importorskip("faiss")
N, D, C = 500, 8, 14


def embeddings(path, count=N):
    """Rows of any length around twelve directions."""
    generator = np.random.default_rng(0)
    around = generator.standard_normal((12, D))[generator.integers(12, size=count)]
    rows = around + 0.4 * generator.standard_normal((count, D))
    np.save(path, (rows * generator.uniform(0.1, 9, (count, 1))).astype(np.float32))
    return path


def clustered(path, out, *words):
    return main(["cluster", str(path), "--clusters", str(C), "--out", str(out), *map(str, words)])


def plain_kmeans(unit, centers, iterations):
    """The same in fp64: assign, mean, unit; half of a large one for a cluster without a row."""
    for _ in range(iterations):
        own = (unit @ centers.T).argmax(1)
        sums = np.stack([unit[own == c].sum(0) for c in range(len(centers))])
        counts = np.bincount(own, minlength=len(centers))
        large = iter(np.argsort(-counts, kind="stable"))
        for empty in np.flatnonzero(counts == 0):
            whole, apart = next(large), np.where(np.arange(D) % 2, -1, 1) / 1024
            sums[empty], sums[whole] = sums[whole] * (1 + apart), sums[whole] * (1 - apart)
        centers = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centers


@pytest.mark.parametrize("doubled", [0, 3])
def test_it_is_the_kmeans_of_a_plain_program(tmp_path, monkeypatch, doubled):
    """From the same beginning; with centers that are there twice, so that some get no row."""
    path = embeddings(tmp_path / "a.npy")
    rows = Rows(path)
    _, first = kmeans.begin(rows, C, 2048)
    first.center_CD[C - doubled :] = first.center_CD[:doubled]
    monkeypatch.setattr(kmeans, "begin", lambda *of: (np.arange(N), first))
    monkeypatch.setattr(kmeans, "PIECE", 128)
    assert clustered(path, tmp_path / "out", "--top", 3, "--iterations", 4) == 0
    raw = np.load(path).astype(np.float64)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    expected = plain_kmeans(unit, first.center_CD.astype(np.float64), 4)
    labels, distances, centers = (
        np.load(tmp_path / "out" / name) for name in ("labels.npy", "distances.npy", "centers.npy")
    )
    assert np.abs(centers - expected).max() < 1e-5
    assert np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    cosine = unit @ expected.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :3]
    assert labels.dtype == np.int64
    assert np.array_equal(labels, order)
    assert distances.dtype == np.float32
    assert np.abs(distances - (1 - np.take_along_axis(cosine, order, 1))).max() < 1e-5


def test_it_finds_the_groups_that_are_there(tmp_path):
    """Twelve directions, a cluster each; what it looks at and where it begins follow the seed."""
    generator = np.random.default_rng(1)
    truth = generator.integers(4, size=N)
    rows = 9 * np.eye(4, D)[truth] + generator.standard_normal((N, D))
    np.save(tmp_path / "a.npy", rows.astype(np.float32))
    words = ["cluster", str(tmp_path / "a.npy"), "--clusters", "4"]
    for name, seed in (("one", 1), ("again", 1), ("other", 3)):
        assert main([*words, "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
    found = {name: np.load(tmp_path / name / "labels.npy") for name in ("one", "again", "other")}
    assert len(set(zip(truth, found["one"][:, 0], strict=True))) == 4
    assert np.array_equal(found["one"], found["again"])
    assert not np.array_equal(found["one"], found["other"])
    results = json.loads((tmp_path / "one" / "cluster.json").read_text())["results"]
    assert results["images_of_a_cluster"]["most"] == np.bincount(truth).max()
    assert results["iterations"] < 20, "it ends when nothing changes"


def test_it_looks_at_so_many_rows_for_a_cluster(tmp_path, monkeypatch):
    path = embeddings(tmp_path / "a.npy")
    monkeypatch.setattr(kmeans, "LOOKED_AT", 10)
    place, now = kmeans.begin(Rows(path), C, 5)
    assert len(np.unique(place)) == 10 * C
    assert (np.diff(place) > 0).all()
    assert now.center_CD.shape == (C, D)


def test_an_image_without_an_embedding_has_no_label(tmp_path, monkeypatch):
    """Labels are by image of the pack, also where pieces begin and end with one left out."""
    path = embeddings(tmp_path / "a.npy", 20)
    left_out = (0, 3, 4, 5, 6, 7, 12, 23)
    assert clustered(path, tmp_path / "all", "--top", 2) == 0
    write_origin(path, Origin("0" * 16, 28, left_out))
    monkeypatch.setattr(assignment, "PIECE", 4)
    assert clustered(path, tmp_path / "some", "--top", 2) == 0
    for name, none in (("labels.npy", -1), ("distances.npy", np.nan)):
        every, some = (np.load(tmp_path / folder / name) for folder in ("all", "some"))
        assert some.shape == (28, 2)
        assert np.array_equal(np.delete(some, left_out, 0), every)
        assert np.array_equal(some[[*left_out]], np.full((8, 2), none), equal_nan=True)


def test_rows_that_are_not_those_of_the_images_are_refused(tmp_path):
    """A label would go to another image."""
    path = embeddings(tmp_path / "a.npy", 10)
    write_origin(path, Origin("0" * 16, 50, (3, 40)))
    with pytest.raises(ValueError, match=r"it has 10 rows, and .* says 50 images, 2 of them"):
        Rows(path)


KILLED = """
import os, signal, sys
from partialfc.__main__ import main
from partialfc.commands._cluster import assignment, kmeans
kmeans.PIECE = assignment.PIECE = 64
where, number = sys.argv[1], int(sys.argv[2])
def dies(owner, name):
    does, calls = getattr(owner, name), []
    def counted(*words):
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return does(*words)
    setattr(owner, name, counted)
if where == "iteration":
    dies(kmeans, "write")
else:
    dies(assignment.Journal, "reached")
sys.exit(main(sys.argv[3:]))
"""


RESUMED = ("--clusters", str(C), "--top", "2", "--iterations", "5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Embeddings, and what a command that nobody stops makes of them in pieces of 64."""
    folder = tmp_path_factory.mktemp("whole")
    path = embeddings(folder / "a.npy")
    with pytest.MonkeyPatch.context() as patch:
        for module in (kmeans, assignment):
            patch.setattr(module, "PIECE", 64)
        assert main(["cluster", str(path), *RESUMED, "--out", str(folder / "out")]) == 0
    return path, folder / "out"


@pytest.mark.parametrize(("where", "number"), [("iteration", 1), ("iteration", 3), ("labels", 4)])
def test_a_kill_and_the_same_command_end_with_the_same_bytes(
    whole, where, number, tmp_path, monkeypatch
):
    path, expected = whole
    words = ["cluster", str(path), *RESUMED, "--out", str(tmp_path / "cut")]
    died = python("-c", KILLED, where, number, *words)
    assert died.returncode == -signal.SIGKILL, died.stderr
    for module in (kmeans, assignment):
        monkeypatch.setattr(module, "PIECE", 64)
    assert main(words) == 0
    names = sorted(file.name for file in expected.iterdir())
    assert names == ["centers.npy", "cluster.json", "distances.npy", "labels.npy"]
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == names
    for name in names:
        assert (expected / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    path = embeddings(tmp_path / "a.npy")
    assert clustered(path, tmp_path / "out") == 0
    assert f"{N} of {N} images in {C} clusters" in capsys.readouterr().out
    monkeypatch.setattr(kmeans, "improve", None)
    assert clustered(path, tmp_path / "out") == 0
    assert "made already" in capsys.readouterr().out


def torn(path):
    path.write_bytes(path.read_bytes()[:100])


def spoiled(path, row, value):
    rows = np.load(path)
    rows[row] = value
    np.save(path, rows)


@pytest.mark.parametrize(
    ("words", "spoil", "message"),
    [
        (("--top", 15), None, "--top 15: must be at most --clusters 14"),
        (("--clusters", 501), None, "--clusters 501: .*a.npy has 500 rows"),
        ((), lambda path, out: spoiled(path, 7, 0), "row 7 has the length 0.0"),
        ((), lambda path, out: spoiled(path, 499, np.nan), "row 499 has the length nan"),
        ((), lambda path, out: torn(path), "a.npy: .*(mmap|header)"),
        ((), lambda path, out: (out.mkdir(), (out / "x").touch()), "out is not empty, and"),
    ],
)
def test_what_cannot_be_is_refused(words, spoil, message, tmp_path, capsys):
    path = embeddings(tmp_path / "a.npy")
    if spoil:
        spoil(path, tmp_path / "out")
    assert clustered(path, tmp_path / "out", *words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_other_words_and_damage_are_refused_where_something_is_there(tmp_path, capsys):
    path = embeddings(tmp_path / "a.npy")
    assert clustered(path, tmp_path / "out") == 0
    assert clustered(path, tmp_path / "out", "--top", 2) == 2
    assert "was made with top 1, not 2" in capsys.readouterr().err
    assert clustered(path.rename(tmp_path / "b.npy"), tmp_path / "out") == 0, "it may have moved"
    spoiled(tmp_path / "b.npy", 7, 1)
    assert clustered(tmp_path / "b.npy", tmp_path / "out") == 2
    assert "was made with embeddings" in capsys.readouterr().err
    for name, left, message in (
        ("cluster.json", "{", "it is damaged"),
        ("kmeans.safetensors", "{" * 20, "it is damaged"),
    ):
        out = tmp_path / name.replace(".", "_")
        shutil.copytree(tmp_path / "out", out)
        journal = json.loads((out / "cluster.json").read_text())
        (out / "cluster.json").write_text(json.dumps({**journal, "results": None, "images": 0}))
        (out / name).write_text(left)
        assert clustered(embeddings(tmp_path / "a.npy"), out) == 2
        assert f"{out / name}: {message}" in capsys.readouterr().err


def test_a_parquet_is_refused_with_the_remedy(tmp_path, capsys):
    (tmp_path / "a.parquet").touch()
    assert clustered(tmp_path / "a.parquet", tmp_path / "out") == 2
    assert "partialfc embed MODEL IMAGES --out FILE.npy" in capsys.readouterr().err
