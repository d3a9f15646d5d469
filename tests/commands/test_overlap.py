"""People that two packs have in common: found, mapped, skipped, and told of test sets."""

import csv
import functools
import json

import numpy as np
import pytest
import torch

from partialfc.__main__ import main
from partialfc.backbones import build_backbone
from partialfc.data.dataset import open_dataset
from partialfc.data.identity_map import numbering, read_identity_map
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.pairs import write_pairs
from partialfc.data.skip_list import read_skip_lists
from partialfc.distributed.ranks import Ranks
from partialfc.evaluation.embedding import embed_images
from partialfc.evaluation.means import mean_embeddings, people_of
from partialfc.protocols.nearest import nearest
from partialfc.runtime.process import Runtime
from tests.support.images import encoded, face
from tests.support.ranks import run_on_ranks

SIZE = 32
EACH = 200
"""Identities of each pack; a tenth of them are in both, under other numbers."""
COMMON = {number: 7 * number for number in range(20)}
"""Of pack B: who they are in pack A."""


def faces_of(person, variants):
    return [encoded(face(person, variant, SIZE)) for variant in variants]


def write_model(path):
    """A random network whose BatchNorms know such images, so that embeddings lie all around."""
    torch.manual_seed(0)
    pixels = np.stack([face(9999 + person, 0, SIZE) for person in range(128)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5) - 1
    backbone = build_backbone("convnet_s", embedding_dim=64, image_size=SIZE).train()
    with torch.no_grad():
        for _ in range(20):
            backbone(images)
    torch.save(backbone.state_dict(), path)
    return path


def write_pack(path, people, variants):
    samples = [(n, jpeg) for n, one in enumerate(people) for jpeg in faces_of(one, variants)]
    write_insightface_pack(path, samples, len(people))
    return path


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """People 0 to 199 are those of A; those of B that are not in A are from 1000 on."""
    folder = tmp_path_factory.mktemp("packs")
    a = write_pack(folder / "a.rec", range(EACH), (0, 1))
    people = [COMMON.get(number, 1000 + number) for number in range(EACH)]
    b = write_pack(folder / "b.rec", people, (2, 3))
    return a, b, write_model(folder / "model.pt")


def run(out, model, *words):
    given = ["overlap", "--model", model, "--out", out, f"--image-size={SIZE}", "--device=cpu"]
    return main([*map(str, given), *map(str, words)])


@pytest.fixture(scope="module")
def found(packs, tmp_path_factory):
    a, b, model = packs
    out = tmp_path_factory.mktemp("found")
    tests = out.parent / "tests"
    tests.mkdir(exist_ok=True)
    images = faces_of(5, (7, 8)) + faces_of(5000, (7, 8)) + faces_of(1100, (8, 9))
    write_pairs(tests / "pairs.bin", images, [True] * 3)
    test = write_pack(tests / "test.rec", [9000, 42, 9001], (4, 5))
    words = (a, b, "--far", "1e-4", "--against", tests / "pairs.bin", test)
    assert run(out, model, *words) == 0
    return out


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_a_tenth_of_common_people_is_found(found):
    """Precision and recall of the pairs."""
    pairs = {(int(one), int(other)) for one, other, _ in rows_of(found / "overlap.csv")}
    right = pairs & set(COMMON.items())
    precision, recall = len(right) / len(pairs), len(right) / len(COMMON)
    assert precision >= 0.95, "four false pairs are expected at most, and 20 are right"
    assert recall == 1


def test_the_map_renumbers_b_onto_a(found, packs):
    a, b, _ = packs
    read = read_identity_map(found / "map.tsv")
    assert (read.of, read.onto) == (numbering(open_dataset([b])), numbering(open_dataset([a])))
    pairs = {(int(one), int(other)) for one, other, _ in rows_of(found / "overlap.csv")}
    assert set(zip(read.identity_M.tolist(), read.onto_M.tolist(), strict=True)) == pairs


def test_the_list_leaves_out_the_images_of_common_people(found, packs):
    dataset = open_dataset([packs[1]], [found / "skip.jsonl"])
    left = set(dataset.labels().tolist())
    mapped = set(read_identity_map(found / "map.tsv").identity_M.tolist())
    assert left == set(range(EACH)) - mapped


def test_who_is_in_a_test_set_is_told_and_left_out(found, packs):
    """Of a .bin image by image, of a pack by identity; of both data sets."""
    leaks = {(row[0], int(row[1]), row[2].rsplit("/", 1)[1]) for row in rows_of(found / "leak.csv")}
    a, b, _ = map(str, packs)
    for leak in ((a, 5, "pairs.bin"), (a, 42, "test.rec"), (b, 100, "pairs.bin")):
        assert leak in leaks
    for pack, letter, identity in ((packs[0], "a", 42), (packs[1], "b", 100)):
        (images,) = read_skip_lists([found / f"leak_{letter}.jsonl"], open_dataset([pack]).packs)
        assert {2 * identity, 2 * identity + 1} <= set(images.tolist())
        assert len(images) < 30
    facts = json.loads((found / "overlap.json").read_text())
    assert [one["identities"] for one in facts["sets"]] == [EACH, EACH, 6, 3]
    assert len(facts["leaks"]) == 4


def test_images_that_cannot_be_used_count_in_no_mean(packs, tmp_path, capsys):
    """One identity has none left; it is nobody's, and the others keep their numbers."""
    samples = [(0, b"no image"), (1, faces_of(3, (9,))[0]), (2, faces_of(9, (9,))[0]), (2, b"\xff")]
    write_insightface_pack(tmp_path / "c.rec", samples, 4)
    a, _, model = packs
    assert run(tmp_path / "out", model, a, tmp_path / "c.rec", "--threshold", "-1") == 0
    pairs = {int(one): int(other) for one, other, _ in rows_of(tmp_path / "out" / "overlap.csv")}
    assert set(pairs) == {1, 2}
    assert "2 identities of 4 images, 2 of them cannot be used" in capsys.readouterr().out


def means_on_rank(rank, world_size, folder):
    runtime = Runtime(Ranks.of(), torch.device("cpu"))
    project = torch.randn(3 * SIZE * SIZE, 16, generator=torch.Generator().manual_seed(0))
    embed = functools.partial(
        embed_images, lambda images: images.flatten(1) @ project, runtime=runtime, size=SIZE
    )
    people = people_of(open_dataset([folder / "d.rec"]))
    found = mean_embeddings(people, embed, runtime, size=SIZE, folder=folder)
    return None if found is None else (found.identity_M, np.array(found.unit_MD), found.unusable)


@pytest.mark.distributed
def test_two_ranks_have_the_means_of_one(tmp_path):
    """Whichever of them reads an image that cannot be used."""
    samples = [(n // 3, jpeg) for n, jpeg in enumerate(faces_of(1, range(90)))]
    for bad in (2, 75):
        samples[bad] = samples[bad][0], b"no image"
    write_insightface_pack(tmp_path / "d.rec", samples, 30)
    one = means_on_rank(0, 1, tmp_path)
    two, nothing = run_on_ranks(2, means_on_rank, tmp_path)
    assert nothing is None
    assert one[2] == two[2] == 2
    assert (one[0] == two[0]).all()
    assert (one[1] == two[1]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--far", "1e-9"], "too few to tell; at least 1,000,000,000 are needed"),
        (["--threshold", "2"], "must be a cosine"),
        (["--far", "1e-3", "--threshold", "0.5"], "not allowed with"),
        ([], "one of the arguments --far --threshold is required"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(packs, tmp_path, words, message, capsys):
    a, b, model = packs
    assert run(tmp_path / "out", model, a, b, *words) == 2
    assert message in capsys.readouterr().err


def test_one_data_set_needs_test_sets(packs, tmp_path, capsys):
    assert run(tmp_path / "out", packs[2], packs[0], "--threshold", "0.5") == 2
    assert "or one and --against with test sets" in capsys.readouterr().err


def test_the_nearest_is_that_of_the_whole_matrix(monkeypatch):
    """Over tiles whose last ones are not full."""
    monkeypatch.setattr("partialfc.protocols.nearest.ROWS", 16)
    monkeypatch.setattr("partialfc.protocols.nearest.COLUMNS", 32)
    generator = np.random.default_rng(0)
    rows = [generator.normal(size=(count, 8)).astype(np.float32) for count in (50, 75)]
    query, gallery = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in rows)
    found, cosine = nearest(query, gallery), query.astype(np.float64) @ gallery.T
    assert (found.place_Q == cosine.argmax(1)).all()
    np.testing.assert_allclose(found.cosine_Q, cosine.max(1), rtol=1e-6)
    with pytest.raises(ValueError, match="gallery must be"):
        nearest(query, gallery[:0])
