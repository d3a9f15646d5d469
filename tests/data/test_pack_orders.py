"""Packs as mxnet's and insightface's scripts write them: their records lie in any order."""

import mmap
import os
import random
import struct

import numpy as np
import pytest

from partialfc.__main__ import main
from partialfc.data.dataset import open_dataset
from partialfc.data.images.jpeg import encode
from partialfc.data.packs import index_cache
from partialfc.data.packs.labels import labels
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import RecordError

JPEGS = [encode(np.full((16, 16, 3), 10 * i, np.uint8)) for i in range(24)]
"""Four images of each of six people, who follow one another; all different."""


def write(folder, records):
    """A .rec and .idx of (key, labels, image) in the order given; one label is the plain kind."""
    folder.mkdir(exist_ok=True)
    rec, idx = b"", ""
    for key, values, image in records:
        array = isinstance(values, tuple)
        data = struct.pack("<IfQQ", len(values) if array else 0, 0 if array else values, key, 0)
        data += struct.pack(f"<{len(values)}f", *values) if array else b""
        data += image
        idx += f"{key}\t{len(rec)}\n"
        rec += struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4)
    (folder / "a.rec").write_bytes(rec)
    (folder / "a.idx").write_text(idx)
    return folder / "a.rec"


def shuffled(folder):
    """im2rec: the list is shuffled, and a record keeps its old number."""
    records = [(key, float(key // 4), jpeg) for key, jpeg in enumerate(JPEGS)]
    random.Random(1).shuffle(records)
    return write(folder, records)


def face2rec(folder, identities):
    """Images, then a record for each run of one label, then the header with key 0."""
    records, runs = [], []
    for key, (identity, jpeg) in enumerate(zip(identities, JPEGS, strict=True), 1):
        if not runs or runs[-1][0] != identity:
            runs.append((identity, key))
        records.append((key, (float(identity), 1.0), jpeg))
    ends = [first for _, first in runs[1:]] + [25]
    for number, ((_, first), stop) in enumerate(zip(runs, ends, strict=True)):
        records.append((25 + number, (float(first), float(stop)), b""))
    records.append((0, (25.0, 25.0 + len(runs)), b""))
    return write(folder, records)


def contents(pack):
    identities = pack.identities(np.arange(len(pack))).tolist()
    return [(identity, pack.jpeg(i)) for i, identity in enumerate(identities)]


TRUE = [(i // 4, jpeg) for i, jpeg in enumerate(JPEGS)]


@pytest.fixture(params=["shuffled", "header last"])
def pack(request, tmp_path):
    folder = tmp_path / "pack"
    if request.param == "shuffled":
        return shuffled(folder)
    return face2rec(folder, [i // 4 for i in range(24)])


def test_a_pack_in_any_order_is_sound_and_in_the_order_of_its_keys(pack, capsys):
    opened = open_pack(pack)
    assert contents(opened) == TRUE
    assert opened.num_identities == 6
    assert labels(opened).tolist() == [identity for identity, _ in TRUE]
    assert main(["validate", str(pack)]) == 0
    shuffled = opened.index.sorted_M is not None
    assert ("data.block reads no neighbours" in capsys.readouterr().out) == shuffled


def test_without_an_idx_records_have_the_keys_that_they_carry(pack):
    expected = open_pack(pack)
    prints = expected.fingerprint
    pack.with_suffix(".idx").unlink()
    with pytest.warns(UserWarning, match="does not exist"):
        scanned = open_pack(pack)
    assert contents(scanned) == TRUE
    assert (scanned.num_identities, scanned.fingerprint) == (6, prints)


def test_records_that_carry_no_keys_of_their_own_have_the_order_of_the_file(tmp_path):
    """Some writers give each the number 0."""
    path = write(tmp_path, [(0, float(i // 4), jpeg) for i, jpeg in enumerate(JPEGS)])
    path.with_suffix(".idx").unlink()
    with pytest.warns(UserWarning, match="does not exist"):
        assert contents(open_pack(path)) == TRUE


def test_its_kept_index_is_its_index_and_one_that_lacks_the_order_is_made_again(pack, monkeypatch):
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    kept = pack.with_name("a.rec.index")
    first = open_pack(pack)
    made = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "read_index", None)  # would be called without the kept one
        again = open_pack(pack)
    assert contents(again) == contents(first) == TRUE
    assert np.array_equal(again.index.offset_M, first.index.offset_M)
    if first.index.sorted_M is not None:
        assert not again.index.sorted_M.flags.writeable, "mapped, not a copy"
        kept.write_bytes(made[:-4] + b"\xff\xff\xff\xff")  # of the order of the file
        assert contents(open_pack(pack)) == TRUE
        assert kept.read_bytes() == made
    kept.write_bytes(made.replace(b'"sorted"', b'"before"'))
    open_pack(pack)
    assert kept.read_bytes() == made


@pytest.mark.parametrize("stretch", [1, 4, 100])
def test_what_is_read_ahead_is_the_images_and_no_gap_between_neighbours_by_key(stretch, tmp_path):
    opened = open_pack(shuffled(tmp_path))
    asked = []

    class Map:
        def madvise(self, advice, start, length):
            asked.append((start, start + length))

    size = opened.file.size
    opened.file._map = Map()
    wanted = np.array([1, 9, 23])
    opened.will_need(wanted, stretch)
    images = [i for i in range(24) if i // stretch in wanted // stretch]
    starts = [opened.offset(i) for i in images]
    ends = np.append(np.sort(opened.index.offset_M), size).tolist()
    pages = [
        (start // mmap.PAGESIZE * mmap.PAGESIZE, ends[ends.index(start) + 1]) for start in starts
    ]
    assert sorted(asked) == sorted(pages)


def test_damage_in_a_shuffled_pack_is_found_and_left_out(tmp_path):
    path = shuffled(tmp_path)
    offset = open_pack(path).offset(5)
    data = bytearray(path.read_bytes())
    data[offset + 4] -= 4  # its length
    path.write_bytes(data)
    bad = tmp_path / "bad.jsonl"
    assert main(["validate", str(path), "--level", "headers", "--bad", str(bad)]) == 1
    assert [f'"offset": {offset},' in line for line in bad.read_text().splitlines()] == [True]
    words = [str(path), str(tmp_path / "new.rec"), "--drop", str(bad)]
    assert main(["convert", "pack", *words]) == 0
    assert contents(open_pack(tmp_path / "new.rec")) == TRUE[:5] + TRUE[6:]


MIXED = [i // 4 for i in range(24)]
random.Random(2).shuffle(MIXED)
GAPS = [i // 4 if i < 12 else i // 4 + 4 for i in range(24)]


@pytest.mark.parametrize(("identities", "count"), [(MIXED, 6), (GAPS, 10)])
def test_runs_of_a_label_that_are_no_people_are_joined_and_named_with_what_mends(
    identities, count, tmp_path
):
    path = face2rec(tmp_path / "p", identities)
    with pytest.warns(UserWarning, match="identity records, .* partialfc convert pack a.rec"):
        opened = open_pack(path)
    assert opened.declared_identities is None
    assert opened.num_identities == count
    assert main(["validate", str(path)]) == 0
    new = tmp_path / "new.rec"
    assert main(["convert", "pack", str(path), str(new)]) == 0
    mended = open_pack(new)
    assert mended.declared_identities == 6
    people = sorted(set(identities))
    pairs = sorted(zip(identities, range(24), strict=True))
    assert contents(mended) == [(people.index(label), JPEGS[image]) for label, image in pairs]


def test_training_names_what_numbers_labels_without_gaps(tmp_path):
    path = write(tmp_path, [(i, float(GAPS[i]), jpeg) for i, jpeg in enumerate(JPEGS)])
    with pytest.warns(UserWarning, match=r"4 of its labels 0\.\.\.9 have no image.* convert pack"):
        assert open_dataset([path]).num_identities == 10


def test_a_damaged_label_of_the_last_person_is_damage(tmp_path):
    path = face2rec(tmp_path, [i // 4 for i in range(24)])
    data = bytearray(path.read_bytes())
    at = open_pack(path).offset(22) + 32  # its first label
    data[at : at + 4] = struct.pack("<f", 9000.0)
    path.write_bytes(data)
    opened = open_pack(path)
    assert opened.declared_identities == 6
    with pytest.raises(RecordError, match=r"label 9000 must be a whole number in \[0, 6\)"):
        opened.identity(22)


def test_images_with_several_labels_and_no_header_are_a_plain_pack(tmp_path):
    """im2rec --pack-label: the record of key 0 has labels and an image."""
    records = [(i, (float(i // 4), 7.0, 8.0), jpeg) for i, jpeg in enumerate(JPEGS)]
    opened = open_pack(write(tmp_path, records))
    assert opened.declared_identities is None
    assert contents(opened) == TRUE


def test_an_idx_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = shuffled(tmp_path)
    path.with_suffix(".idx").unlink()
    os.mkfifo(path.with_suffix(".idx"))
    with pytest.raises(RecordError, match="is no regular file"):
        open_pack(path)
