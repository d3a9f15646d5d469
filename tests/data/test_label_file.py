"""Labels beside packs: the right row of every sample, and nothing that is out of range."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from partialfc.data.augment import Augmentation
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.joined import JoinedSets
from partialfc.data.label_file import LabelFile, shape_of
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import PackWriter
from tests.support.images import LOADERS
from tests.support.places import FIXTURES

PACKS = [FIXTURES / "records" / "insightface.rec", FIXTURES / "records" / "plain.rec"]


def saved(path, values, dtype=np.int64):
    np.save(path, np.asarray(values, dtype))
    return path


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_sample_has_the_row_of_its_image_whatever_is_skipped(tmp_path, dtype):
    """Rows are of the images of both packs, the skipped ones too; skip lists move samples."""
    for name, count in (("a", 6), ("b", 9)):
        with PackWriter(tmp_path / f"{name}.rec") as writer:
            for key in range(count):
                writer.write(key, 0, b"\xff\xd8 no image is looked at" + name.encode())
    row_NK = np.stack([np.arange(15), np.arange(100, 115)], 1)
    row_NK[1, 1] = -1
    own = LabelFile(saved(tmp_path / "labels.npy", row_NK, dtype), 15, num_identities=200)
    packs = [open_pack(tmp_path / f"{name}.rec") for name in ("a", "b")]
    dataset = DataSet(packs, [np.array([0, 2, 4]), np.array([8])], own)
    samples = np.array([10, 0, 4, 2, 1])  # images b7, a1, b1, a5, a3
    found = dataset.identities(samples)
    assert found.dtype == np.int64
    assert found.tolist() == [[13, 113], [1, -1], [7, 107], [5, 105], [3, 103]]
    assert (dataset.num_identities, dataset.most) == (200, 2)
    with pytest.raises(ValueError, match=r"Remove data\.images_per_identity"):
        dataset.labels()


@pytest.mark.parametrize(
    ("values", "weights", "words"),
    [
        ([0, 1], None, "labels of 2 images, and the data has 3"),
        ([0, -2, 1], None, "image 1 has the label -2"),
        ([0, 7, 1], None, "it is 7, and .* has the label 7. Set it to 8"),
        ([-1, -1, -1], None, "all its labels are -1"),
        ([[[0]], [[1]], [[2]]], None, r"holds int64 \[3, 1, 1\], must be int32 or int64"),
        ([0, 1, 2], [[1.0], [1.0]], r"is \[2, 1\], must be \[3, 1\]"),
        ([0, 1, 2], [0, 0, 0], "all its weights are 0: no label counts"),
        ([0, 1, 2], [1, np.nan, 1], "image 1 has a weight that is negative or not finite"),
        ([0, 1, 2], [1, 1, -1], "image 2 has a weight that is negative or not finite"),
        ([0, 1, 2], [1, 1, 1e300], "image 2 has a weight"),
    ],
)
def test_what_is_no_label_is_refused_by_name(tmp_path, values, weights, words):
    path = saved(tmp_path / "labels.npy", values)
    beside = None if weights is None else saved(tmp_path / "w.npy", weights, np.float64)
    with pytest.raises(ValueError, match=words):
        LabelFile(path, 3, weights=beside, num_identities=7)


def test_a_file_that_is_no_array_is_refused_unread(tmp_path):
    """No pickle is opened, and no length of a header is believed."""
    path = tmp_path / "labels.npy"
    np.save(path, np.array([{}, {}, {}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"labels\.npy: "):
        LabelFile(path, 3)
    saved(path, [0, 1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"labels\.npy: "):
        LabelFile(path, 3)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"labels\.npy: "):
        LabelFile(path, 3)
    np.save(path, np.zeros((3, 2), np.int64, order="F"))
    with pytest.raises(ValueError, match="in columns, must be row by row"):
        LabelFile(path, 3)


def test_a_digest_is_of_every_label_and_weight_and_not_of_the_dtype(tmp_path):
    prints = []
    for dtype, last, weight in (
        (np.int64, 2, 1),
        (np.int32, 2, 1),
        (np.int32, 3, 1),
        (np.int32, 2, 2),
    ):
        path = saved(tmp_path / "labels.npy", [0, 1, last], dtype)
        beside = saved(tmp_path / "w.npy", [1, 1, weight], np.float32)
        prints.append(LabelFile(path, 3, weights=beside).digest)
        assert shape_of(path) == (3, 1)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_carry_the_rows_of_their_images(tmp_path, loader):
    """Of an image that stands for another its own; on any rank, resumed or not."""
    count = len(open_dataset(PACKS))
    row_NK = np.arange(3 * count).reshape(count, 3)
    labels = saved(tmp_path / "labels.npy", row_NK)
    weights = saved(tmp_path / "w.npy", row_NK % 5, np.float16)
    dataset = open_dataset(PACKS, labels=labels, weights=weights)
    stream = Stream(
        dataset=dataset,
        order=Order(count, 12, seed=5),
        augmentation=Augmentation(flip=0),
        image_size=112,
        rank=1,
        world_size=2,
    )
    stream.cannot_decode(int(stream.order.sample_ids(12, 1, 2)[2]), "made up")
    options = {"device": torch.device("cpu"), "loader": loader, "threads": 1}
    with closing(open_batches(stream, 12, **options)) as batches:
        found = list(islice(batches, 3))
    for batch in found:
        weight_BK = row_NK[batch.sample_ids] % 5
        assert batch.weights.tolist() == weight_BK.tolist()
        expected = np.where(weight_BK == 0, -1, row_NK[batch.sample_ids])
        assert batch.identities.tolist() == expected.tolist()


def test_sets_have_labels_of_their_own_and_as_many_as_the_one_with_most(tmp_path):
    """One of the pack's, one of [N, 2] with weights: filled up, numbered on, and 1 where unsaid."""
    packs = open_dataset(PACKS[:1]), open_dataset(PACKS[1:])
    first, count = len(packs[0]), len(packs[1])
    label_N2 = np.stack([np.arange(count), np.full(count, -1)], 1)
    label_N2[3, 1] = 0
    labels = saved(tmp_path / "labels.npy", label_N2)
    weights = saved(tmp_path / "w.npy", np.full((count, 2), 0.5), np.float32)
    own = open_dataset(PACKS[1:], labels=labels, weights=weights)
    joined = JoinedSets({"a": packs[0], "b": own}, {"a": (), "b": ()})
    start = packs[0].num_identities
    assert (joined.most, joined.num_identities) == (2, start + count)
    samples = np.array([first + 3, 1, first])
    of_first = int(packs[0].identities([1])[0])
    expected = [[start + 3, start], [of_first, -1], [start, -1]]
    assert joined.identities(samples).tolist() == expected
    assert joined.weights(samples).tolist() == [[0.5, 0.5], [1, 0], [0.5, 0.5]]
    assert next(joined.records(samples))[1].size
    with pytest.raises(ValueError, match=r"Remove data\.images_per_identity"):
        joined.labels()

    saved(labels, np.arange(count)[::-1])
    joined = JoinedSets(
        {"a": packs[0], "b": open_dataset(PACKS[1:], labels=labels)}, {"a": (), "b": ()}
    )
    assert joined.most is None
    expected = [*packs[0].labels(), *(start + np.arange(count)[::-1])]
    assert joined.labels().tolist() == expected
