"""The kept index: of this pack or not used, found again by every process, and never needed."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from partialfc.data.packs import index_cache
from partialfc.data.packs.index import scan
from partialfc.data.packs.labels import labels
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import MAGIC_BYTES, RecordError, RecordFile
from partialfc.data.packs.writer import PackWriter
from tests.support.places import FIXTURES, ROOT

GOLDEN = FIXTURES / "records"


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A golden pack in a folder of its own, large enough to be kept."""
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr("partialfc.data.packs.labels.KEPT_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "packs").mkdir()
    for suffix in (".rec", ".idx"):
        shutil.copy(GOLDEN / f"insightface{suffix}", tmp_path / "packs" / f"a{suffix}")
    return tmp_path / "packs" / "a.rec"


def read_all(path):
    opened = open_pack(path)
    images = [opened.jpeg(i) for i in range(len(opened))]
    keys = [opened.key(i) for i in range(len(opened))]
    return images, keys, opened.identities(np.arange(len(opened))).tolist(), opened.fingerprint


def test_a_small_pack_leaves_nothing_behind(tmp_path):
    for suffix in (".rec", ".idx"):
        shutil.copy(GOLDEN / f"plain{suffix}", tmp_path / f"a{suffix}")
    open_pack(tmp_path / "a.rec")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.rec"]


def test_the_kept_index_is_the_index_and_is_mapped(pack, monkeypatch):
    expected = read_all(GOLDEN / "insightface.rec")
    assert read_all(pack) == expected
    assert pack.with_name("a.rec.index").exists()
    monkeypatch.setattr(index_cache, "read_index", None)  # would be called without it
    assert read_all(pack) == expected
    offsets = open_pack(pack).index.offset_M
    assert not offsets.flags.writeable
    assert pack.with_name("a.rec.index").stat().st_size == 4096 + 8 * 73


def test_keys_that_are_not_consecutive_are_kept_too(pack):
    lines = pack.with_suffix(".idx").read_text().splitlines()
    lines = [lines[0], *(line for line in lines[1:] if not line.startswith("7\t"))]
    pack.with_suffix(".idx").write_text("\n".join(lines[::-1]) + "\n")
    first = read_all(pack)
    assert first[1] == [key for key in range(1, 61) if key != 7]
    assert pack.with_name("a.rec.index").stat().st_size == 4096 + 16 * 72
    assert read_all(pack) == first


@pytest.mark.parametrize("changed", [".idx", ".rec"])
def test_a_pack_that_changed_is_read_again(pack, changed):
    """Even if its size did not change: the time tells."""
    before = read_all(pack)
    file = pack.with_suffix(changed)
    if changed == ".idx":
        lines = file.read_text().splitlines()
        lines[3], lines[4] = (f"{lines[i].split()[0]}\t{lines[7 - i].split()[1]}" for i in (3, 4))
        file.write_text("\n".join(lines) + "\n")
    else:
        opened = open_pack(pack)
        data = bytearray(file.read_bytes())
        data[opened.offset(5) + 12 : opened.offset(5) + 16] = np.float32(11).tobytes()
        labels(opened)
        file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    after = read_all(pack)
    assert after != before
    if changed == ".rec":
        assert labels(open_pack(pack))[5] == 11, "labels of the old file"


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-8],
    "header": lambda data: b"[" * 4096 + data[4096:],
    "another kind of header": lambda data: b"[1]".ljust(4096) + data[4096:],
    "an offset": lambda data: data[:-8] + b"\x04" + data[-7:],
    "records": lambda data: data.replace(b'"records": 73', b'"records": -1'),
    "key": lambda data: data.replace(b'"first_key": 0', b'"first_key": []'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_made_again(pack, kind):
    before = read_all(pack)
    kept = pack.with_name("a.rec.index")
    good = kept.read_bytes()
    kept.write_bytes(DAMAGE[kind](good))
    assert read_all(pack) == before
    assert kept.read_bytes() == good


def test_a_read_only_file_system_uses_the_users_cache(pack, tmp_path):
    """A real one, where this user may mount; the pack's folder stays as it was."""
    code = (
        "from partialfc.data.packs import index_cache; index_cache.KEPT_FROM = 1; import sys;"
        "from partialfc.data.packs.pack import open_pack; print(len(open_pack(sys.argv[1])))"
    )
    folder = pack.parent
    script = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, str(pack)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == "60\n", done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["a.idx", "a.rec"]
    (kept,) = (tmp_path / "cache" / "partialfc").iterdir()
    assert kept.name.endswith(".index")


def test_without_any_place_to_write_a_pack_opens_all_the_same(pack, monkeypatch, tmp_path):
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    monkeypatch.setattr(index_cache, "cache_places", lambda path, name: [nowhere / name])
    assert read_all(pack) == read_all(GOLDEN / "insightface.rec")
    assert labels(open_pack(pack)).tolist() == read_all(pack)[2]


def test_many_processes_that_open_at_once_all_succeed(pack):
    """The ranks of a host: one reads the .idx, or several do, and none sees half a file."""
    code = (
        "from partialfc.data.packs import index_cache; index_cache.KEPT_FROM = 1; import sys;"
        "from partialfc.data.packs.pack import open_pack; print(open_pack(sys.argv[1]).fingerprint)"
    )
    with ThreadPoolExecutor(6) as pool:
        done = list(
            pool.map(
                lambda _: subprocess.run(
                    [sys.executable, "-c", code, str(pack)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                ),
                range(6),
            )
        )
    assert {process.stdout.strip() for process in done} == {open_pack(pack).fingerprint}
    assert sorted(path.name for path in pack.parent.iterdir()) == ["a.idx", "a.rec", "a.rec.index"]


def test_labels_are_kept_and_a_bad_one_is_told_apart(pack):
    data = bytearray(pack.read_bytes())
    at = open_pack(pack).offset(4)
    data[at + 12 : at + 16] = np.float32(-3).tobytes()
    pack.write_bytes(data)
    expected = read_all(GOLDEN / "insightface.rec")[2]
    expected[4] = -1
    for _ in range(2):
        assert labels(open_pack(pack)).tolist() == expected
    kept = pack.with_name("a.rec.labels")
    assert json.loads(kept.read_bytes()[:4096])["digest"]
    kept.write_bytes(kept.read_bytes()[:-4] + b"\1\0\0\0")
    assert labels(open_pack(pack)).tolist() == expected


# Without an index


def offsets_one_by_one(file):
    offsets, offset = [], 0
    while offset < file.size:
        offsets.append(offset)
        offset = file.next_offset(offset)
    return offsets


@pytest.mark.parametrize("name", ["insightface", "plain", "labels2"])
@pytest.mark.parametrize("block", [1 << 24, 64])
def test_the_parallel_scan_finds_what_a_walk_finds(name, block, monkeypatch):
    monkeypatch.setattr("partialfc.data.packs.index._BLOCK", block)
    file = RecordFile(GOLDEN / f"{name}.rec")
    assert scan(file).tolist() == offsets_one_by_one(file)


@pytest.mark.parametrize("image", [MAGIC_BYTES, b"abcd" + MAGIC_BYTES * 2 + b"efgh"])
def test_a_magic_that_a_foreign_writer_left_in_an_image_is_no_record(tmp_path, image):
    """mxnet's writer takes them out; another may not. The walk does not see them."""
    with PackWriter(tmp_path / "a.rec") as writer:
        for key in range(4):
            writer.write(key, key, b"x" * len(image))
    data = (tmp_path / "a.rec").read_bytes().replace(b"x" * len(image), image, 2)
    (tmp_path / "a.rec").write_bytes(data)
    file = RecordFile(tmp_path / "a.rec")
    assert scan(file).tolist() == offsets_one_by_one(file)
    assert len(scan(file)) == 4


def test_a_scan_of_damage_gives_the_offset(tmp_path):
    data = bytearray((GOLDEN / "plain.rec").read_bytes())
    at = open_pack(GOLDEN / "plain.rec").offset(30)
    data[at] ^= 1
    (tmp_path / "a.rec").write_bytes(data)
    with pytest.raises(RecordError, match=f"offset {at}: magic"):
        scan(RecordFile(tmp_path / "a.rec"))


def test_a_lock_that_somebody_keeps_is_waited_for_a_while_and_said(tmp_path, monkeypatch, capsys):
    """It stopped every start, in silence."""
    monkeypatch.setattr(index_cache, "_SECONDS_TO_WAIT", 0.5)
    monkeypatch.setattr(index_cache, "_SECONDS_OF_SILENCE", 0.1)
    path = tmp_path / "train.rec"
    path.write_bytes(b"x")
    with index_cache.alone(path), index_cache.alone(path):
        assert "train.rec: another process holds its lock" in capsys.readouterr().err
    with index_cache.alone(path):
        assert not capsys.readouterr().err
