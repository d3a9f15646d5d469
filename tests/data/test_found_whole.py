"""Of the ranks of a host one looks at sources and hashes what is kept; the others trust it."""

import shutil

import pytest

from partialfc.data import found_whole
from partialfc.data.files import index as of_files
from partialfc.data.packs import index, index_cache, labels
from partialfc.data.packs.pack import open_pack
from partialfc.data.source import open_source
from partialfc.data.tars import store
from tests.data.test_tars import write_shards
from tests.support.images import encoded, lopsided
from tests.support.places import FIXTURES


@pytest.fixture(params=["pack", "folder", "shards"])
def source(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(labels, "KEPT_FROM", 1)
    monkeypatch.setattr(found_whole, "_own", set())
    if request.param == "pack":
        for suffix in (".rec", ".idx"):
            shutil.copy(FIXTURES / "records" / f"insightface{suffix}", tmp_path / f"a{suffix}")
        return tmp_path / "a.rec"
    if request.param == "shards":
        return write_shards(tmp_path / "shards", ["ann", "bea", "bea", "cem"])
    for number, name in enumerate(("ann", "bea")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.jpg").write_bytes(encoded(lopsided(48, 48, number)))
    return tmp_path / "photos"


def opened(source):
    found = open_source(source)
    numbers = labels.labels(found) if source.suffix == ".rec" else found.index.identity_N
    return found.fingerprint, numbers.tolist()


class Hashed(Exception):
    """It costs 57 s of a billion records, and 33 s of two million folders."""


def refuse(*words, **more):
    raise Hashed


def forbid_looks(monkeypatch):
    monkeypatch.setattr(index.hashlib, "blake2b", refuse)
    monkeypatch.setattr(index_cache, "_digest", refuse)
    monkeypatch.setattr(of_files, "_folder_stamp", refuse)
    monkeypatch.setattr(store._Files, "stamp", refuse)
    # What stands for a file is hashed all the same: its name and times.
    monkeypatch.setattr(found_whole, "_mark", lambda place: str(place.stat()).encode())


def test_what_another_rank_of_the_host_found_whole_is_not_looked_at_again(source, monkeypatch):
    monkeypatch.setattr(found_whole, "_mark", lambda place: str(place.stat()).encode())
    expected = opened(source)
    assert opened(source) == expected
    marks = found_whole.own()
    assert marks
    with monkeypatch.context() as patch:
        forbid_looks(patch)
        with pytest.raises(Hashed):
            opened(source)
        with found_whole.trusting(marks):
            assert opened(source) == expected
        with pytest.raises(Hashed):  # only inside
            opened(source)
    assert opened(source) == expected


def test_what_was_touched_since_is_looked_at(source, tmp_path):
    """Of the same size and time, but not written by the one who looked."""
    expected = opened(source)
    assert opened(source) == expected
    marks = found_whole.own()
    for kept in (
        *tmp_path.glob("*.index"),
        *tmp_path.glob("*.labels"),
        *tmp_path.glob("cache/**/*.index"),
    ):
        damaged = bytearray(kept.read_bytes())
        damaged[-1] ^= 1
        kept.write_bytes(damaged)
    with found_whole.trusting(marks):
        assert opened(source) == expected


def test_a_pack_is_hashed_once_in_a_process(tmp_path, source, monkeypatch):
    """It was hashed when its kept index was read, and for the run's fingerprint again."""
    if source.suffix != ".rec":
        pytest.skip("the others keep their fingerprint")
    found = open_pack(source)
    monkeypatch.setattr(index.hashlib, "blake2b", refuse)
    assert found.fingerprint
