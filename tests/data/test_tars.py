"""Training from tar shards where they lie: what a pack of them is, and what a far store does."""

import contextlib
import io
import itertools
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from partialfc.commands.split import images_of
from partialfc.config import load
from partialfc.config.tree import to_toml
from partialfc.data.arrangements import arrangement
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.names import names_of
from partialfc.data.order import Order
from partialfc.data.packs.pack import open_pack
from partialfc.data.skip_list import write_skip_list
from partialfc.data.source import open_source
from partialfc.data.tars import ahead, store
from partialfc.data.tars.places import expanded
from partialfc.data.tars.store import ShardError
from partialfc.definitions.urls import url_of
from tests.support.images import LOADERS, encoded, lopsided
from tests.support.places import ROOT
from tests.support.processes import partialfc
from tests.support.runs import UNVERIFIED, killed_at, losses, run
from tools.bench._data.slow import SlowFileSystem

WHO = ["zoe", "ann", "bea", "ann", "zoe", "cem", "ann", "cem", "bea", "dan"]
SIZE = 48


def member(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, who, shards=3, label="cls", size=SIZE) -> Path:
    """So many shards of an image for each name, in that order."""
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(who)), shards)):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for i in part.tolist():
                member(tar, f"{i:05d}.jpg", encoded(lopsided(size, size, i)))
                text = who[i] if label == "cls" else json.dumps({"width": 1, "label": who[i]})
                member(tar, f"{i:05d}.{label}", text.encode())
    return folder


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path, monkeypatch):
    """The index of a URL is kept in the user's cache folder, and no request waits for another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "FIRST_WAIT", 0.0)
    SlowFileSystem.reset()


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", WHO)


def far(folder: Path) -> Path:
    return Path(f"slow:/{folder}")


def stream_of(path, batch=4, rank=0, world_size=1, **how):
    dataset = open_dataset([Path(path)])
    order = Order(
        len(dataset), batch, seed=5, last_batch="pad", arrangement=arrangement(dataset, **how)
    )
    return Stream(
        dataset=dataset,
        order=order,
        augmentation=Augmentation(shift=2),
        image_size=SIZE,
        rank=rank,
        world_size=world_size,
    )


def take(number, stream, samples_seen=0, loader="torch"):
    batches = open_batches(
        stream, samples_seen, device=torch.device("cpu"), loader=loader, threads=2
    )
    with contextlib.closing(batches):
        return list(itertools.islice(batches, number))


# What it is


@pytest.mark.parametrize(("command", "label"), [(["pack"], "json"), (["convert", "pack"], "cls")])
def test_shards_are_what_the_pack_of_them_is(tmp_path, command, label):
    """Sample for sample and batch for batch, to the last bit, near and far, however arranged."""
    who = WHO if command == ["convert", "pack"] else sorted(WHO)
    folder = write_shards(tmp_path / "shards", who, label=label)
    more = ["--layout", "plain"] if command[0] == "convert" else ["--size", SIZE, "--workers", 1]
    done = partialfc(*command, folder, tmp_path / "a.rec", *more)
    assert done.returncode == 0, done.stderr
    pack = open_dataset([tmp_path / "a.rec"])
    assert names_of(pack) == sorted(set(WHO))
    for path in (folder, folder / "{0000..0002}.tar", far(folder)):
        tars = open_dataset([path])
        assert names_of(tars) == names_of(pack)
        assert tars.labels().tolist() == pack.labels().tolist()
        assert [tars.jpeg(i) for i in range(len(WHO))] == [pack.jpeg(i) for i in range(len(WHO))]
        for how in ({}, {"block": 2, "block_window": 2}, {"images_per_identity": 2}):
            expected = take(5, stream_of(tmp_path / "a.rec", **how))
            for ours, theirs in zip(take(5, stream_of(path, **how)), expected, strict=True):
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.identities, theirs.identities)
                assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()


@pytest.mark.parametrize("loader", LOADERS)
def test_any_world_size_and_any_resume_see_the_same_images(shards, loader):
    """A rank of two that begins in the middle, at a URL, gets its half of what one saw."""
    for how in ({}, {"block": 3, "block_window": 2}):
        straight = take(4, stream_of(shards, 4, **how), loader=loader)
        resumed = take(2, stream_of(far(shards), 4, 1, 2, **how), 8, loader=loader)
        for whole, half in zip(straight[2:], resumed, strict=True):
            assert torch.equal(whole.images[2:], half.images)
            assert torch.equal(whole.identities[2:], half.identities)


def test_a_name_is_one_shard_or_a_pattern_of_them(shards):
    assert expanded("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expanded("{0..1}/{8..9}") == ["0/8", "0/9", "1/8", "1/9"]
    assert len(open_source(shards / "0001.tar")) == 3
    with pytest.raises(ValueError, match=r"the range \{3\.\.1\} must not fall"):
        expanded("{3..1}.tar")
    with pytest.raises(ValueError, match="at most"):
        expanded("{0..9999}{0..9999}")
    (shards / "ann").mkdir()
    (shards / "ann" / "0.jpg").write_bytes(encoded(lopsided(SIZE, SIZE, 1)))
    assert len(open_source(shards)) == 1, "a folder of folders is one, whatever lies beside them"


def test_a_url_is_a_setting_that_is_written_and_read_again(tmp_path):
    """A path has one slash where a URL has two; neither of them may become a folder here."""
    for url in ("s3://bucket/shards", "http://host:8000/{00..12}.tar", "simplecache::s3://b/x.tar",
                "file:///data/x.tar", "memory://x.tar"):  # fmt: skip
        config = load(ROOT / "configs" / "demo.toml", [f"data.train={url}"])
        (path,) = config.data.train
        assert url_of(path) == url
        written = tmp_path / "config.toml"
        written.write_text(to_toml(config))
        assert f'"{url}"' in written.read_text()
        assert load(written).data.train == (path,)
    assert url_of(Path("c:/x.tar")) is None
    assert url_of(Path("/data/s3:/x.tar")) is None


# The kept index


def test_the_index_is_made_once_and_again_when_a_shard_changes(shards, tmp_path):
    """All shards are read for it: at a store that is hours, and what it costs."""
    first = open_source(far(shards))
    assert SlowFileSystem.requests == 3
    again = open_source(far(shards))
    assert SlowFileSystem.requests == 3
    assert again.fingerprint == first.fingerprint == open_source(shards).fingerprint
    assert pickle.loads(pickle.dumps(again)).fingerprint == first.fingerprint
    assert not again.index.offset_N.flags.writeable
    with tarfile.open(shards / "0001.tar", "w") as tar:
        member(tar, "eva/1.jpg", encoded(lopsided(SIZE, SIZE, 99)))
    changed = open_source(far(shards))
    assert SlowFileSystem.requests == 6
    assert names_of(open_dataset([far(shards)])) == ["ann", "bea", "cem", "dan", "eva", "zoe"]
    assert changed.fingerprint not in (first.fingerprint,)
    (kept,) = (tmp_path / "cache" / "partialfc").iterdir()
    damaged = bytearray(kept.read_bytes())
    damaged[4096 + 8 * 4] ^= 1
    kept.write_bytes(damaged)
    assert open_source(far(shards)).fingerprint == changed.fingerprint
    kept.write_bytes(kept.read_bytes()[:-1])
    assert open_source(far(shards)).fingerprint == changed.fingerprint


def test_a_shard_that_is_cut_or_missing_is_named(shards):
    """An order over what is left of it would be another one without a word."""
    path = shards / "0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 20 * 10 - 100])
    for place in (shards, far(shards)):
        with pytest.raises(ShardError, match=r"0001\.tar: byte \d+ of \d+: .*Copy it again"):
            open_source(place)
    path.unlink()
    for place in (shards / "{0000..0002}.tar", far(shards / "{0000..0002}.tar")):
        with pytest.raises(ShardError, match=r"0001\.tar: "):
            open_source(place)


def test_a_shard_of_zeros_and_labels_that_are_no_text_are_named(shards, tmp_path):
    """Half of the data was trained on without a word, and labels could become one."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.jpg", b"x"), ("1.cls", b"\xff\xfe"), ("ann/2.jpg", b"x")):
            member(tar, name, data)
    with pytest.warns(UserWarning, match=r"1.cls: its label is no text of UTF-8"):
        assert len(open_source(tmp_path / "a.tar")) == 1
    (shards / "0001.tar").write_bytes(bytes(10_240))
    with pytest.raises(ShardError, match=r"0001.tar: it is empty, of 10,240 bytes"):
        open_source(shards)


def test_images_without_a_label_are_said_and_nothing_else_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.jpg", b"x"), ("1.json", b'{"caption": "x"}'), ("ann/2.jpg", b"x")):
            member(tar, name, data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert len(open_source(tmp_path / "a.tar")) == 1
    text = " ".join(str(one.message) for one in said)
    assert "1 members cannot be used" in text
    assert "a.tar: 1.jpg: no .cls" in text
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        member(tar, "1.jpg", b"x")
    with pytest.raises(ShardError, match="no image with a label"):
        open_source(tmp_path / "b.tar")


# Far away


def test_blocks_are_read_in_few_ranges_and_many_are_under_way(tmp_path, monkeypatch):
    """A request an image takes 20 ms each; a window of blocks is read once and kept."""
    folder = write_shards(tmp_path / "shards", [str(i % 9) for i in range(96)], shards=4)
    stream = stream_of(far(folder), batch=8, block=8, block_window=3)
    SlowFileSystem.reset(latency=0.02)
    for step in range(12):
        stream.batch(8 * step)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    # The look ahead has begun the next epoch: 12 blocks of this one and half of the next at most.
    assert SlowFileSystem.requests <= 12 + 6
    assert SlowFileSystem.sent < 1.6 * size
    assert SlowFileSystem.most >= 3
    monkeypatch.setattr(ahead, "_GAP", 0)
    shuffled = stream_of(far(folder), batch=8)
    SlowFileSystem.reset(latency=0.02)
    shuffled.batch(0)
    shuffled.batch(8)
    assert SlowFileSystem.most > 8, "those of a later batch are under way too"


def test_what_fails_for_a_moment_is_asked_for_again_and_no_longer(shards, capsys):
    open_source(far(shards))
    SlowFileSystem.failures = [TimeoutError("slow"), ConnectionResetError("gone")]
    source = open_source(far(shards))
    assert source.jpeg(0) == open_source(shards).jpeg(0)
    assert SlowFileSystem.failures == []
    said = capsys.readouterr().err
    assert "0000.tar: ConnectionResetError: gone; attempt 2 of 6" in said
    SlowFileSystem.failures = [TimeoutError("slow")] * store.ATTEMPTS
    with pytest.raises(ShardError, match=r"0000\.tar: it could not be read 6 times: TimeoutError"):
        source.jpeg(0)
    SlowFileSystem.failures = [PermissionError("no key")] * 2
    with pytest.raises(ShardError, match=r"0000\.tar: it could not be read: PermissionError"):
        source.jpeg(0)
    assert len(SlowFileSystem.failures) == 1, "that does not pass"


def test_a_store_that_never_answers_is_named(shards, monkeypatch):
    """One request that hangs held the run for good."""
    source = open_source(far(shards))
    monkeypatch.setattr(ahead, "ANSWER", 0.05)
    SlowFileSystem.reset(latency=0.5)
    source.will_need(np.arange(2))
    with pytest.raises(ShardError, match=r"0000\.tar: no answer in"):
        source.jpeg(0)


@pytest.mark.parametrize("where", [Path, far])
def test_a_shard_that_changes_or_goes_during_a_run_is_named(shards, where):
    """No image of another person is trained on, and the run does not skip them one by one."""
    stream = stream_of(where(shards), batch=10)
    path = shards / "0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[512:] + bytes(512))
    with pytest.raises(ShardError, match=r"0001\.tar: bytes \d+ to \d+ are not the file of"):
        stream.batch(0)
    path.unlink()
    with pytest.raises(ShardError, match=r"0001\.tar"):
        stream_of(where(shards / "{0000..0002}.tar"), batch=10)
    stream = stream_of(where(shards), batch=7)
    (shards / "0002.tar").unlink()
    with pytest.raises(ShardError, match=r"0002\.tar"):
        stream.batch(0)


def test_bad_images_are_replaced_listed_by_shard_and_left_out(tmp_path):
    """As those of packs; the list names shard and byte."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(4):
                good = encoded(lopsided(SIZE, SIZE, 4 * number + i))
                member(tar, f"{'ab'[number]}/{i}.jpg", b"" if (number, i) == (1, 2) else good)
            member(tar, "b/z.jpg", b"no image")
    batch = stream_of(folder, batch=10).batch(0)
    assert sorted(one.sample_id for one in batch.replaced) == [4, 7, 9]
    texts = sorted(str(one.bad) for one in batch.replaced)
    assert texts[1].startswith("image 7, 1.tar, byte ")
    assert "0 bytes" in texts[1]
    skip = tmp_path / "skip.jsonl"
    write_skip_list(skip, [(one.pack, one.bad) for one in batch.replaced])
    left = open_dataset([far(folder)], [skip])
    assert (len(left), left.num_identities) == (7, 2)
    done = partialfc("validate", folder, "--bad", tmp_path / "found.jsonl", "--workers", 1)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 3


def test_what_reads_no_shards_says_so(shards, tmp_path):
    for path in (shards, shards / "0000.tar", Path("s3:/bucket/shards")):
        for refuses in (open_pack, images_of):
            with pytest.raises(ValueError, match="partialfc convert pack"):
                refuses(path)
    with pytest.raises(ShardError, match="a pack is read by mapping its file"):
        open_source(Path(f"slow:/{tmp_path}/a.rec"))
    with pytest.raises(ShardError, match=r"no \.tar among them"):
        open_source(far(tmp_path))
    with pytest.raises(ValueError, match="nosuch"):
        open_source(Path("nosuch:/bucket/a.tar"))


@pytest.mark.slow
def test_a_run_on_shards_is_that_on_their_pack_and_resumes_exactly(tmp_path):
    """At a URL, on one rank and on two, killed and gone on with: every loss is the same."""
    folder = write_shards(tmp_path / "shards", [str(i % 9) for i in range(60)], shards=4, size=32)
    done = partialfc("convert", "pack", folder, tmp_path / "train.rec", "--layout", "plain")
    assert done.returncode == 0, done.stderr
    common = ("run.steps=6", "schedule.warmup_steps=1", "data.block=5", "data.block_window=3",
              "checkpoint.every_steps=2", *UNVERIFIED)  # fmt: skip
    url = f"data.train=local://{folder}"
    for name, where in (("pack", ()), ("shards", (url,))):
        done = run(tmp_path, tmp_path / name, *common, *where)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "shards") == losses(tmp_path / "pack")
    killed_at(4, tmp_path, tmp_path / "killed", *common, url, ranks=2)
    done = run(tmp_path, tmp_path / "killed", *common, url, ranks=2)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, tmp_path / "two", *common, url, ranks=2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
