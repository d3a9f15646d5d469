"""Embeddings made beforehand: the right row of every sample, and nothing that is not theirs."""

import json

import numpy as np
import pytest

from partialfc.data.dataset import DataSet
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import PackWriter
from partialfc.data.vectors import Origin, Vectors, origin_path, write_origin


def pack_of(path, images):
    with PackWriter(path) as writer:
        for key in range(images):
            writer.write(key, key % 3, b"\xff\xd8 no image is looked at" + bytes([key]))
    return open_pack(path)


def embedded(path, pack, left_out=(), first=0.0):
    """Row of image i: i + first, twice."""
    images = [i for i in range(len(pack)) if i not in left_out]
    rows = np.repeat(np.asarray(images, np.float32)[:, None] + np.float32(first), 2, axis=1)
    np.save(path, rows)
    write_origin(path, Origin(pack.fingerprint, len(pack), tuple(left_out)))
    return path


def test_every_sample_has_the_row_of_its_image(tmp_path):
    """Two packs, images that could not be embedded, and skipped ones that are no samples."""
    packs = [pack_of(tmp_path / f"{name}.rec", n) for name, n in (("a", 6), ("b", 9))]
    paths = [
        embedded(tmp_path / "a.npy", packs[0], left_out=(0, 4)),
        embedded(tmp_path / "b.npy", packs[1], first=100),
    ]
    skipped = [np.array([0, 2, 4]), np.array([8])]
    dataset = DataSet(packs, skipped)
    vectors = Vectors(paths, dataset)
    samples = np.array([10, 0, 4, 2, 1])  # images b7, a1, b1, a5, a3
    assert vectors.of(samples)[:, 0].tolist() == [107, 1, 101, 5, 3]


def test_a_sample_without_a_row_is_refused_before_the_first_step(tmp_path):
    """The run would end at the batch that has it, hours later and at every start."""
    packs = [pack_of(tmp_path / f"{name}.rec", n) for name, n in (("a", 6), ("b", 9))]
    paths = [
        embedded(tmp_path / "a.npy", packs[0]),
        embedded(tmp_path / "b.npy", packs[1], left_out=(0, 4, 7)),
    ]
    none = np.empty(0, np.int64)
    with pytest.raises(ValueError, match=r"b\.npy: it has no embedding of image 0 and 1 others,"):
        Vectors(paths, DataSet(packs, [np.array([0, 4]), np.array([4])]))
    with pytest.raises(ValueError, match=r"b\.npy: .* of image 7, which .* data\.skip"):
        Vectors(paths, DataSet(packs, [none, np.array([0, 4])]))
    Vectors(paths, DataSet(packs, [none, np.array([0, 2, 4, 7])]))


def test_another_file_or_other_values_have_another_digest(tmp_path):
    pack = pack_of(tmp_path / "a.rec", 6)
    dataset = DataSet([pack])
    digests = {
        Vectors([embedded(tmp_path / "a.npy", pack, first=first)], dataset).digest
        for first in (0, 1, 0)
    }
    assert len(digests) == 2


def test_what_is_not_of_the_training_data_is_refused(tmp_path):
    pack, other = pack_of(tmp_path / "a.rec", 6), pack_of(tmp_path / "b.rec", 5)
    dataset = DataSet([pack])
    path = embedded(tmp_path / "a.npy", other)
    with pytest.raises(
        ValueError, match=r"are of a pack of 5 images .*a\.rec of data\.train has 6"
    ):
        Vectors([path], dataset)
    embedded(path, pack)
    with pytest.raises(ValueError, match="2 files of embeddings for the 1 packs"):
        Vectors([path, path], dataset)
    np.save(path, np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match="5 rows, and 0 left out, of 6 images"):
        Vectors([path], dataset)
    origin_path(path).unlink()
    with pytest.raises(ValueError, match=r"a\.origin\.json is not beside it"):
        Vectors([path], dataset)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "size|bytes"),
        (lambda data: data + b"1234", "bytes, and its header says"),
        (lambda data: b"not an array", "magic"),
        (lambda data: data.replace(b"(6, 2)", b"(9, 2)"), "size|bytes"),
        (lambda data: data.replace(b"<f4", b"<i4"), "holds int32"),
        (lambda data: data.replace(b"False", b"True "), "must be row by row"),
        (lambda data: data.replace(b"'<f4'", b"'|O' "), "[Oo]bject|Python"),
        (lambda data: b"", "empty|EOF|magic|mmap"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    pack = pack_of(tmp_path / "a.rec", 6)
    path = embedded(tmp_path / "a.npy", pack)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.npy: .*({message})"):
        Vectors([path], DataSet([pack]))


@pytest.mark.parametrize(
    "change",
    [
        {"left_out": [5, 4]},
        {"left_out": [6]},
        {"left_out": ["1"]},
        {"images": True},
        {"fingerprint": 3},
        {"left_out": None},
    ],
)
def test_a_damaged_origin_is_refused(tmp_path, change):
    pack = pack_of(tmp_path / "a.rec", 6)
    path = embedded(tmp_path / "a.npy", pack)
    found = json.loads(origin_path(path).read_text())
    origin_path(path).write_text(json.dumps(found | change))
    with pytest.raises(ValueError, match=r"a\.npy: a\.origin\.json"):
        Vectors([path], DataSet([pack]))
