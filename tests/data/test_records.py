"""Packs: what mxnet wrote is read and written byte for byte, and nothing hostile gets through."""

import hashlib
import json
import mmap
import pickle
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.dataset import open_dataset
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import MAGIC_BYTES, RecordError, RecordFile
from partialfc.data.packs.writer import PackWriter, write_insightface_pack
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "records"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
NAMES = [pack["name"] for pack in MANIFEST]


def manifest(name):
    return next(pack for pack in MANIFEST if pack["name"] == name)


@pytest.mark.parametrize("name", NAMES)
def test_golden_packs_are_read_as_their_manifest_says(name):
    expected = manifest(name)
    pack = open_pack(GOLDEN / f"{name}.rec")
    assert len(pack) == expected["images"] == len(expected["records"])
    assert pack.num_identities == expected["identities"]
    labels = [record["label"] for record in expected["records"]]
    labels = [label[0] if isinstance(label, list) else label for label in labels]
    assert pack.identities(np.arange(len(pack))).tolist() == labels
    for index, record in enumerate(expected["records"]):
        jpeg = pack.jpeg(index)
        assert len(jpeg) == record["bytes"]
        assert hashlib.sha256(jpeg).hexdigest() == record["sha256"]
        assert pack.jpeg_view(index).tobytes() == jpeg
        assert pack.identity(index) == labels[index]
    assert pack.jpeg_bytes(range(len(pack))).tolist() == [r["bytes"] for r in expected["records"]]


@pytest.mark.parametrize("name", NAMES)
def test_our_bytes_are_mxnets_for_the_same_records(name, tmp_path):
    source = RecordFile(GOLDEN / f"{name}.rec")
    lines = (GOLDEN / f"{name}.idx").read_text().splitlines()
    with PackWriter(tmp_path / "copy.rec") as writer:
        for key, offset in (map(int, line.split("\t")) for line in lines):
            record = source.read(offset)
            label = record.label_L.tolist() if record.flag else float(record.label_L[0])
            writer.write(key, label, record.image.tobytes())
    assert (tmp_path / "copy.rec").read_bytes() == (GOLDEN / f"{name}.rec").read_bytes()
    assert (tmp_path / "copy.idx").read_bytes() == (GOLDEN / f"{name}.idx").read_bytes()


def test_an_insightface_pack_is_written_whole_as_mxnet_would(tmp_path):
    pack = open_pack(GOLDEN / "insightface.rec")
    samples = [(pack.identity(i), pack.jpeg(i)) for i in range(len(pack))]
    write_insightface_pack(tmp_path / "copy.rec", samples, pack.num_identities)
    for suffix in (".rec", ".idx"):
        copy, golden = tmp_path / f"copy{suffix}", GOLDEN / f"insightface{suffix}"
        assert copy.read_bytes() == golden.read_bytes()


def test_views_are_not_copies_and_the_file_cannot_be_changed_through_them():
    pack = open_pack(GOLDEN / "plain.rec")
    views = [pack.jpeg_view(index) for index in range(len(pack))]
    # Only the images whose records were cut at a magic had to be joined.
    joined = [view.flags.writeable for view in views]
    assert 1 <= sum(joined) <= 2
    magics = [MAGIC in view.tobytes() for view in views]
    assert all(magic or not copy for magic, copy in zip(magics, joined, strict=True))


def test_a_pack_goes_to_another_process_by_its_path():
    pack = open_pack(GOLDEN / "insightface.rec")
    again = pickle.loads(pickle.dumps(pack))
    assert again.jpeg(5) == pack.jpeg(5)
    assert len(pickle.dumps(pack)) < 1000


def test_without_an_index_the_file_is_scanned(tmp_path):
    shutil.copy(GOLDEN / "labels2.rec", tmp_path)
    with pytest.warns(UserWarning, match=r"labels2\.idx does not exist"):
        scanned = open_pack(tmp_path / "labels2.rec")
    pack = open_pack(GOLDEN / "labels2.rec")
    assert [scanned.jpeg(i) for i in range(len(pack))] == [pack.jpeg(i) for i in range(len(pack))]


@pytest.mark.parametrize("kept_from", [1 << 17, 1])
def test_packs_that_differ_in_their_labels_alone_are_told_apart(tmp_path, monkeypatch, kept_from):
    """Their fingerprint is the same; a run would have gone on with other people's centers."""
    monkeypatch.setattr("partialfc.data.packs.labels.KEPT_FROM", kept_from)
    people = {"a": [0, 0, 1, 1, 2, 2], "b": [0, 0, 0, 1, 2, 2], "again": [0, 0, 1, 1, 2, 2]}
    sets = {}
    for name, labels in people.items():
        write_insightface_pack(tmp_path / f"{name}.rec", [(one, b"jpeg") for one in labels], 3)
        sets[name] = open_dataset([tmp_path / f"{name}.rec"])
    assert sets["a"].fingerprint == sets["b"].fingerprint
    prints = {name: dataset.labels_fingerprint for name, dataset in sets.items()}
    assert prints["a"] == prints["again"] != prints["b"]


def test_fingerprint_sees_another_pack_but_not_another_place(tmp_path):
    for suffix in (".rec", ".idx"):
        shutil.copy(GOLDEN / f"plain{suffix}", tmp_path / f"moved{suffix}")
    moved = open_pack(tmp_path / "moved.rec").fingerprint
    assert moved == open_pack(GOLDEN / "plain.rec").fingerprint
    assert moved != open_pack(GOLDEN / "labels2.rec").fingerprint


MAGIC = MAGIC_BYTES


@pytest.mark.parametrize(
    "image",
    [
        b"x",
        MAGIC,
        MAGIC * 3,
        b"abcd" + MAGIC + b"efgh" + MAGIC,
        b"ab" + MAGIC + b"cd",
        b"a" + MAGIC * 2,
        bytes(range(256)) * 5 + MAGIC[:3],
    ],
)
def test_any_payload_comes_back(image, tmp_path):
    """The magic at an aligned place cuts a record into parts; elsewhere it is only bytes."""
    with PackWriter(tmp_path / "a.rec") as writer:
        writer.write(0, 3.0, b"first")
        writer.write(1, 4.0, image)
        writer.write(2, 5.0, b"last")
    pack = open_pack(tmp_path / "a.rec")
    assert [pack.jpeg(i) for i in range(3)] == [b"first", image, b"last"]
    assert pack.identities([0, 1, 2]).tolist() == [3, 4, 5]


def test_an_interrupted_write_leaves_no_pack(tmp_path):
    def interrupted():
        with PackWriter(tmp_path / "a.rec") as writer:
            writer.write(0, 1.0, b"image")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("samples", "identities", "message"),
    [
        ([(1, b"x"), (0, b"x")], 2, "identity 0 of image 1"),
        ([(2, b"x")], 2, "identity 2 of image 0"),
        ([(0, b"")], 1, "image 0 has 0 bytes"),
        ([], 1, "no images"),
        ([(0, b"x")], 0, "num_identities must be in"),
        ([(0, b"x")], 1 << 25, "where float32 labels are exact"),
    ],
)
def test_a_pack_that_cannot_be_is_refused_when_written(samples, identities, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_insightface_pack(tmp_path / "a.rec", samples, identities)
    assert not list(tmp_path.iterdir())


def record(image=b"jpeg", flag=0, label=1.0, labels=(), *, kind=0, length=None, magic=MAGIC):
    content = struct.pack("<IfQQ", flag, label, 0, 0)
    content += b"".join(struct.pack("<f", value) for value in labels) + image
    length = len(content) if length is None else length
    return magic + struct.pack("<I", kind << 29 | length) + content + bytes(-len(content) % 4)


def pack_of(folder, *records, index=None):
    """A plain pack of raw records; ``index`` replaces the true one."""
    offsets = np.cumsum([0, *map(len, records)])
    (folder / "bad.rec").write_bytes(b"".join(records))
    true = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets[:-1]))
    (folder / "bad.idx").write_text(true if index is None else index)
    return folder / "bad.rec"


def read_all(path):
    pack = open_pack(path)
    for index in range(len(pack)):
        pack.identity(index)
        pack.jpeg_view(index)
    pack.identities(np.arange(len(pack)))
    return pack.num_identities


GOOD = record()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(magic=b"abcd"), r"offset 32: magic 0x64636261, must be 0xced7230a"),
        (record(length=5000), r"offset 32: length 5000, but only \d+ bytes are left"),
        (record(length=(1 << 29) - 1), r"offset 32: length 536870911, but only"),
        (record(length=8), r"offset 32: a record of 8 bytes, must be >= 24"),
        (record(kind=2), r"offset 32: part kind 2, must be 0 or 1 where a record begins"),
        (record(kind=3), r"offset 32: part kind 3, must be 0 or 1"),
        (record(kind=1) + record(kind=0), r"offset 64: part kind 0, must be 2 or 3"),
        (record(kind=1) + record(kind=2), r"part must begin .* so that it ends inside the file"),
        (record(flag=(1 << 32) - 1), r"offset 32: flag 4294967295 needs as many labels"),
        (record(flag=2), r"offset 32: flag 2 needs as many labels"),
        (record(image=b""), r"offset 32: image 1 has 0 bytes"),
        (record(label=float("nan")), r"offset 32: label nan must be a whole number"),
        (record(label=float("inf")), r"offset 32: label inf must be a whole number"),
        (record(label=1.5), r"offset 32: label 1\.5 must be a whole number"),
        (record(label=-1.0), r"offset 32: label -1 must be a whole number"),
        (record(label=2.0**24), r"offset 32: label 16777216 must be a whole number in \[0, 16777"),
        (record(flag=1, labels=(0.5,)), r"offset 32: label 0\.5 must be a whole number"),
    ],
)
def test_hostile_records_are_refused_by_offset(bad, message, tmp_path):
    path = pack_of(tmp_path, GOOD, bad)
    message = message.replace("offset 32", f"offset {len(GOOD)}")
    message = message.replace("offset 64", f"offset {len(GOOD) + len(record(kind=1))}")
    with pytest.raises(RecordError, match=message) as refused:
        read_all(path)
    assert "bad.rec" in str(refused.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0\t0\n0\t36\n", "line 2: key 0 is on line 1 already"),
        ("0\t0\n1\t0\n", "line 2: offset 0 is on line 1 already"),
        ("0\t0\n1\t-36\n", r"line 2: b'1\\t-36' must be two integers"),
        ("0\t0\n1\t34\n", "line 2: offset 34 must be a multiple of 4"),
        ("0\t0\n1\t4000\n", "line 2: offset 4000 must be .* inside the .rec of"),
        ("0\t0\n1 36\n", "line 2: .* must be two integers"),
        ("0\t0\nkey\toffset\n", "line 2: .* must be two integers"),
        ("0\t0\n1\t99999999999999999999\n", "line 2: .* must be two integers"),
        ("0\t0\n\n1\t36\n", "line 2: .* must be two integers"),
        ("", "line 1: the index is empty"),
    ],
)
def test_hostile_indexes_are_refused_by_line(index, message, tmp_path):
    with pytest.raises(RecordError, match=message) as refused:
        open_pack(pack_of(tmp_path, GOOD, GOOD, index=index))
    assert "bad.idx" in str(refused.value)


def test_an_unsorted_index_is_sorted_by_key(tmp_path):
    path = pack_of(
        tmp_path, record(b"zero"), record(b"one!"), index=f"1\t{len(record(b'zero'))}\n0\t0\n"
    )
    pack = open_pack(path)
    assert [pack.jpeg(0), pack.jpeg(1)] == [b"zero", b"one!"]


@pytest.mark.parametrize("cut", [1, 4, 30])
def test_a_truncated_file_is_refused(cut, tmp_path):
    for suffix in (".rec", ".idx"):
        shutil.copy(GOLDEN / f"insightface{suffix}", tmp_path / f"short{suffix}")
    whole = (tmp_path / "short.rec").read_bytes()
    (tmp_path / "short.rec").write_bytes(whole[:-cut])
    with pytest.raises(RecordError, match="offset"):
        read_all(tmp_path / "short.rec")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.rec").touch()
    with pytest.raises(RecordError, match="the file is empty"):
        open_pack(tmp_path / "empty.rec")


def test_a_label_beyond_the_declared_identities_is_refused(tmp_path):
    header = record(b"", flag=2, labels=(4.0, 6.0))
    people = [record(b"", flag=2, labels=labels) for labels in ((1.0, 3.0), (3.0, 4.0))]
    images = [record(label=label) for label in (0.0, 2.0, 1.0)]
    pack = open_pack(pack_of(tmp_path, header, *images, *people))
    assert (len(pack), pack.num_identities) == (3, 2)
    with pytest.raises(RecordError, match=r"label 2 must be a whole number in \[0, 2\)"):
        pack.identities([0, 1])


def test_a_header_that_disagrees_with_the_records_is_refused(tmp_path):
    identity = record(b"", flag=2, labels=(1.0, 2.0))
    path = pack_of(tmp_path, record(b"", flag=2, labels=(9.0, 10.0)), GOOD, identity)
    with pytest.raises(RecordError, match="the header says that images end before key 9"):
        open_pack(path)


INSIGHTFACE = (GOLDEN / "insightface.rec").read_bytes()
INDEX = (GOLDEN / "insightface.idx").read_bytes()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.lists(st.tuples(st.integers(0, len(INDEX) - 1), st.integers(0, 255)), max_size=2),
    st.integers(0, len(INSIGHTFACE)),
)
def test_mutated_packs_give_typed_errors_or_work(tmp_path_factory, changes, index_changes, cut):
    folder = tmp_path_factory.mktemp("fuzz")
    data, index = bytearray(INSIGHTFACE), bytearray(INDEX)
    for at, value in changes:
        data[at] = value
    for at, value in index_changes:
        index[at] = value
    (folder / "a.rec").write_bytes(data[: len(data) - cut // 50] if cut % 3 == 0 else data)
    (folder / "a.idx").write_bytes(index)
    try:
        read_all(folder / "a.rec")
    except RecordError as error:
        assert "a.rec" in str(error) or "a.idx" in str(error)  # noqa: PT017
    finally:
        shutil.rmtree(folder)


# Reading ahead


@pytest.mark.parametrize("name", ["insightface", "plain", "labels2"])
@pytest.mark.parametrize("stretch", [1, 7, 1000])
def test_what_is_asked_of_the_disk_is_the_images_and_nothing_around_them(name, stretch):
    """Else a disk that reads 8 MiB ahead reads a pack of 300 GB a thousand times in an epoch."""
    pack = open_pack(GOLDEN / f"{name}.rec")
    asked = set()

    class Map:
        def madvise(self, advice, start, length):
            assert advice == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0
            asked.update(range(start, start + length))

    pack.file._map = Map()
    wanted = np.array([59, 3, 58, 20])
    pack.will_need(wanted, stretch)
    ends = [*pack.index.offset_M.tolist(), pack.file.size]
    needed = set()
    for image in range(60):
        if image // stretch in wanted // stretch:
            start = pack.offset(image)
            needed.update(range(start, ends[ends.index(start) + 1]))
    assert needed <= asked
    page = mmap.PAGESIZE
    assert {at // page for at in asked} == {at // page for at in needed}


def test_no_range_beyond_the_file_is_asked_for(tmp_path):
    """A part that claims gigabytes, and an index that lacks all records but the first."""
    shutil.copy(GOLDEN / "plain.rec", tmp_path)
    (tmp_path / "plain.idx").write_text("0\t0\n")
    pack = open_pack(tmp_path / "plain.rec")
    (stop,) = pack.index.stops(np.array([0]), pack.file.size)
    assert stop == pack.file.size
