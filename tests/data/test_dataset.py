"""Several packs as one data set, and images that are left out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.packs.pack import open_pack
from partialfc.data.skip_list import BadRecord, read_skip_lists, write_skip_list
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "records"
NAMES = ("insightface", "plain", "labels2")
PATHS = [GOLDEN / f"{name}.rec" for name in NAMES]


def listed(path: Path, pack, images) -> Path:
    write_skip_list(path, [(pack, BadRecord.of(pack, i, "not wanted")) for i in images])
    return path


def test_packs_follow_one_another_and_so_do_their_identities():
    """Else two packs would train the same centers with different people."""
    packs = [open_pack(path) for path in PATHS]
    dataset = open_dataset(PATHS)
    assert len(dataset) == sum(map(len, packs))
    assert dataset.num_identities == sum(pack.num_identities for pack in packs)
    identity, sample = 0, 0
    for pack in packs:
        ids = np.arange(len(pack))
        ours = dataset.identities(sample + ids)
        np.testing.assert_array_equal(ours, identity + pack.identities(ids))
        assert [dataset.jpeg(sample + i) for i in ids] == [pack.jpeg(i) for i in ids]
        identity, sample = identity + pack.num_identities, sample + len(pack)
    mixed = np.array([170, 3, 61, 119, 0])
    np.testing.assert_array_equal(
        dataset.identities(mixed), [int(dataset.identities([i])[0]) for i in mixed]
    )


def test_one_pack_has_its_own_fingerprint():
    """A run of before there were data sets goes on."""
    assert open_dataset(PATHS[:1]).fingerprint == open_pack(PATHS[0]).fingerprint


@pytest.mark.parametrize("skipped", [[0], [59], [5, 6, 7], [0, 1, 30, 58, 59], list(range(1, 60))])
def test_skipped_images_are_left_out_and_nothing_else_moves(tmp_path, skipped):
    """Against a plain list: samples are the images that are left, in their order."""
    packs = [open_pack(path) for path in PATHS]
    skip = [
        listed(tmp_path / "a.jsonl", packs[0], skipped),
        listed(tmp_path / "b.jsonl", packs[2], skipped[:1] * 2),
    ]
    dataset = open_dataset(PATHS, skip)
    left = [
        (pack, image)
        for number, pack in enumerate(packs)
        for image in range(len(pack))
        if image not in {0: skipped, 1: [], 2: skipped[:1]}[number]
    ]
    assert len(dataset) == len(left)
    assert dataset.num_skipped == len(skipped) + 1
    for sample, (pack, image) in enumerate(left):
        found, place = dataset.locate(sample)
        assert (found.path, place) == (pack.path, image)
        assert dataset.jpeg(sample) == pack.jpeg(image)
    whole = open_dataset(PATHS)
    assert dataset.num_identities == whole.num_identities, "a skipped image renames no identity"
    assert dataset.fingerprint != whole.fingerprint
    for sample in (-1, len(left)):
        with pytest.raises(IndexError, match=re.escape(f"sample {sample} not in [0, {len(left)})")):
            dataset.locate(sample)


def test_a_list_of_another_pack_or_with_anything_wrong_in_it_is_refused(tmp_path):
    pack = open_pack(PATHS[0])
    good = json.loads(BadRecord.of(pack, 3, "why").line(pack))
    assert good["key"] == 4
    assert good["offset"] == pack.offset(3)
    cases = [
        ({"fingerprint": "0" * 16}, "is of none of the packs"),
        ({"image": 60}, r"image 60 must be in \[0, 60\)"),
        ({"image": -1}, r"image -1 must be in"),
        ({"image": True}, "must be a JSON object"),
        ({"image": 1.5}, "must be a JSON object"),
        ({"fingerprint": 7}, "must be a JSON object"),
    ]
    path = tmp_path / "list.jsonl"
    for change, message in cases:
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(ValueError, match=f"list.jsonl: line 2: .*{message}"):
            read_skip_lists([path], [pack])
    for text in ("[1]", "nonsense", '{"image": 3}', "[" * 100_000, "7", "\xff\n"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"list.jsonl: line 1: .*must be a JSON object"):
            read_skip_lists([path], [pack])


def test_a_record_that_is_no_image_may_be_listed(tmp_path):
    pack = open_pack(PATHS[0])
    write_skip_list(tmp_path / "a.jsonl", [(pack, BadRecord(None, 0, 0, "the header"))])
    (images,) = read_skip_lists([tmp_path / "a.jsonl"], [pack])
    assert not len(images)


def test_a_pack_twice_and_an_empty_data_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="among the packs twice"):
        open_dataset([PATHS[0], PATHS[1], PATHS[0]])
    pack = open_pack(PATHS[0])
    with pytest.raises(ValueError, match="all 60 images are skipped"):
        open_dataset(PATHS[:1], [listed(tmp_path / "a.jsonl", pack, range(60))])


def test_a_plain_pack_with_a_bad_label_can_be_used_without_it(tmp_path):
    """num_identities of a plain pack reads all labels, but not those of skipped images."""
    data = bytearray((GOLDEN / "plain.rec").read_bytes())
    pack = open_pack(PATHS[1])
    at = pack.offset(4) + 12
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "plain.rec").write_bytes(data)
    (tmp_path / "plain.idx").write_bytes((GOLDEN / "plain.idx").read_bytes())
    damaged = open_pack(tmp_path / "plain.rec")
    with pytest.raises(ValueError, match="label nan"):
        DataSet([damaged]).num_identities  # noqa: B018
    skip = listed(tmp_path / "a.jsonl", damaged, [4])
    dataset = open_dataset([damaged.path], [skip])
    assert dataset.num_identities == pack.num_identities
