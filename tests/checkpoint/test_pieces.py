"""Checksums of pieces, and files that are opened where they have what a rank reads."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from partialfc.checkpoint import CheckpointError, pieces, tensor_reader
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint import parts as parts_module
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import note_of, read_manifest
from partialfc.checkpoint.parts import files_with_rows, parts_of
from partialfc.checkpoint.pieces import Note
from partialfc.checkpoint.tensor_file import write_tensors
from partialfc.checkpoint.tensor_reader import opened_tensors
from partialfc.checkpoint.verifying import verify
from partialfc.errors import DamagedError
from partialfc.head.sharding import Sharding
from partialfc.model.batch_norm import statistics
from tests.checkpoint.test_checkpoint import FACTS, save, signed, trained
from tests.support.models import flat_model, normed_model, runtime, settings, weights
from tests.support.places import ROOT
from tests.support.ranks import run_on_ranks

OLD = ROOT / "tests" / "fixtures" / "checkpoints" / "format_4"
OLD_FACTS = {"seed": 2048, "pack": "abc"}


@pytest.fixture
def small(monkeypatch):
    """Pieces of 512 bytes, in what is written from now on."""
    monkeypatch.setattr(pieces, "PIECE", 512)
    monkeypatch.setattr(tensor_reader, "_READ_AT_ONCE", 512)


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 8
    file.write_bytes(content)


def test_each_piece_that_changed_is_named_with_its_place_and_both_checksums(tmp_path, small):
    path = save(tmp_path, 2, trained(2))
    file = "centers_0000000000.safetensors"
    note = note_of(path, read_manifest(path), file)
    assert len(note.sha256) == -(-note.bytes // 512) > 10
    before = (path / file).read_bytes()
    for number, expected in enumerate(note.sha256):
        start, stop = note.bounds(number)
        flip(path / file, stop - 1)
        words = (
            rf"{re.escape(file)} is corrupt: the SHA-256 of its bytes {start:,} to {stop:,} is "
            rf"[0-9a-f]{{16}}\.\.\., and was {expected[:16]}"
        )
        assert re.search(words, verify(path))
        with pytest.raises(DamagedError, match=words):
            checkpoint.load(path, flat_model(settings()), FACTS, runtime())
        (path / file).write_bytes(before)
    assert verify(path) is None


def test_shares_of_any_number_of_ranks_are_every_piece_once(tmp_path, small, monkeypatch):
    """A share that nobody took would be damage that nobody finds."""
    path = save(tmp_path, 2, trained(2))
    manifest, seen = read_manifest(path), []
    names = [*manifest["files"], *parts_of(manifest)]
    every = sorted(
        (name, number)
        for name in names
        for number in range(len(note_of(path, manifest, name).sha256))
    )
    monkeypatch.setattr(
        "partialfc.checkpoint.verifying.compare_pieces",
        lambda file, note, some, pool: seen.extend((file.name, number) for number in some),
    )
    for ranks in (1, 2, 3, 5, 8, 64):
        seen.clear()
        for rank in range(ranks):
            assert verify(path, part=rank, of=ranks) is None
        assert sorted(seen) == every


def test_rows_are_read_in_a_few_pieces_and_only_those_that_have_them(tmp_path, small, monkeypatch):
    """A matrix of 100 GB needs no second one in memory, and its other rows no look."""
    rows = {"centers": torch.randn(200, 16), "at_step": torch.arange(200).view(200, 1)}
    file = tmp_path / "x.safetensors"
    note, read = write_tensors(file, rows, Disk()), []
    piece = tensor_reader.TensorReader._piece

    def noted(self, number, size):
        read.append(number)
        return piece(self, number, size)

    monkeypatch.setattr(tensor_reader.TensorReader, "_piece", noted)
    for low, high in ((0, 200), (70, 90), (199, 200), (8, 8)):
        read.clear()
        into = {name: torch.zeros_like(value[low:high]) for name, value in rows.items()}
        with opened_tensors(file, note, compare=True) as reader:
            reader.fill({name: (value, low) for name, value in into.items()})
            wanted = {0} | {
                at // 512
                for name, place in reader.places.items()
                for row in range(low, high)
                for at in (
                    place.start + row * rows[name][:1].nbytes,
                    place.start + (row + 1) * rows[name][:1].nbytes - 1,
                )
            }
        assert read == sorted(wanted)
        assert all(torch.equal(into[name], rows[name][low:high]) for name in rows)
    flip(file, note.bytes - 1)
    with opened_tensors(file, note, compare=True) as reader:  # of another row
        assert torch.equal(reader.read({"centers": slice(0, 9)})["centers"], rows["centers"][:9])


def test_a_part_of_another_checkpoint_is_none_of_this(tmp_path):
    """Both are whole, and a copy by hand may mix them; the model was the same."""
    model = trained(2)
    one, two = save(tmp_path, 1, model), save(tmp_path, 2, model)
    for name in ("centers_0000000000.safetensors", "centers_0000000000.json"):
        shutil.copy(one / name, two / name)
    assert re.search(r"centers_0000000000.json is of .* of the checkpoint marked", verify(two))
    with pytest.raises(DamagedError, match="of the checkpoint marked"):
        checkpoint.load(two, flat_model(settings()), FACTS, runtime())


@pytest.mark.parametrize("lost", ["centers_0000000000.safetensors", "centers_0000000000.json"])
def test_a_part_that_rank_0_does_not_see_ends_the_save(tmp_path, lost):
    """Disks of its own for each host: every rank had written, and nothing could be read."""

    class Elsewhere(Disk):
        def sync(self, path):
            super().sync(path)
            if path.name == lost:
                path.unlink()

    with (
        pytest.raises(CheckpointError, match=rf"1 of \d+ files are not where.*{lost}.*all hosts"),
        checkpoint.Saver(tmp_path, FACTS, runtime(), keep=1, disk=Elsewhere()) as saver,
    ):
        saver.save(1, trained())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change",
    [
        {"parts": []},
        {"parts": {"statistics": -1, "centers": {}}},
        {"parts": {"statistics": 2**40, "centers": {}}},
        {"parts": {"statistics": 0, "centers": {"": 7}}},
        {"parts": {"statistics": 0, "centers": {"": {"ranks": 0, "rows_per_identity": 1}}}},
        {"parts": {"statistics": 0, "centers": {"": {"ranks": 2**50, "rows_per_identity": 1}}}},
        {"parts": {"statistics": 0, "centers": {"": {"ranks": 1, "rows_per_identity": True}}}},
        {"parts": {"statistics": 0, "centers": {"no": {"ranks": 1, "rows_per_identity": 1}}}},
        {"heads": {"/../../../etc/x": {"num_identities": 1, "canonical_shards": 1}}},
        {"heads": {"a/b": {"num_identities": 1, "canonical_shards": 1}}},
        {"heads": {"a\n": {"num_identities": 1, "canonical_shards": 1}}},
        {"mark": 7},
        {"num_identities": 0},
    ],
    ids=str,
)
def test_parts_that_cannot_be_are_refused_in_bounded_time(tmp_path, change):
    path = save(tmp_path, 1)
    signed(path, lambda manifest: manifest.update(change))
    assert verify(path).startswith("manifest.json: ")


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": []},
        {"sha256": ["a", "b"]},
        {"sha256": [7]},
        {"piece": 0},
        {"piece": 12},
        {"piece": 2**40},
        {"bytes": True},
        {"bytes": -1},
        {"tensors": "x"},
    ],
    ids=str,
)
def test_a_note_that_does_not_agree_with_itself_is_none(change):
    note = {"bytes": 100, "piece": 512, "sha256": ["a"], "tensors": []}
    assert Note.of(note).as_json() == note
    with pytest.raises(ValueError, match=r"must|bytes are not"):
        Note.of({**note, **change})


@pytest.mark.parametrize("header", [b"[", b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_a_header_that_is_none_is_an_error(tmp_path, header):
    file = tmp_path / "x.safetensors"
    for length in (len(header), 0, 2**63, len(header) + 1):
        file.write_bytes(length.to_bytes(8, "little") + header)
        note = Note(8 + len(header), 512, ("x",))
        with (
            pytest.raises(DamagedError, match="is no file of tensors"),
            opened_tensors(file, note, compare=False),
        ):
            pass


@pytest.mark.parametrize(
    "about",
    [
        {"data_offsets": [0, 4000]},
        {"data_offsets": [-8, 8]},
        {"shape": [2**61, 8]},
        {"shape": [-1, -4]},
        {"shape": [True, 4]},
        {"dtype": "X"},
        {"data_offsets": [2, 18]},
    ],
    ids=str,
)
def test_a_tensor_that_lies_outside_of_its_file_is_an_error(tmp_path, about):
    file = tmp_path / "x.safetensors"
    said = {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16], **about}
    header = json.dumps({"a": said}).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    note = Note(file.stat().st_size, 512, ("x",))
    with (
        pytest.raises(DamagedError, match="is no file of tensors"),
        opened_tensors(file, note, compare=False),
    ):
        pass


@pytest.mark.parametrize("ranks", [1, 3, 7, 768])
def test_files_are_found_by_arithmetic_as_the_ranks_cut_them(ranks):
    """For every rank of another number: those that have its rows, and no other."""
    manifest = {
        "files": {},
        "num_identities": 5003,
        "canonical_shards": 1024,
        "parts": {"statistics": 0, "centers": {"": {"ranks": ranks, "rows_per_identity": 3}}},
    }

    def cut(size):
        sharding = Sharding(num_identities=5003, canonical_shards=1024, world_size=size)
        every = map(sharding.owned, range(size))
        return [range(3 * one.start, 3 * one.stop) for one in every]

    for size in (1, 2, 5, 768, 1024):
        for rows in cut(size):
            expected = [one.start for one in cut(ranks) if set(one) & set(rows)]
            assert [first for first, _ in files_with_rows(manifest, "", rows)] == expected


def test_1024_parts_on_768_ranks_are_1536_opens_in_all(monkeypatch):
    """Each reads one or two; every rank that looked into all of them would be 786,432."""

    firsts_of = parts_module._firsts

    def opens(parts, ranks):
        sizes = {"num_identities": 1_000_003, "canonical_shards": 4096}
        cut = {"ranks": parts, "rows_per_identity": 1}
        manifest = {"files": {}, **sizes, "parts": {"centers": {"": cut}}}
        firsts = firsts_of(manifest, "")  # once, and not for each of the ranks
        monkeypatch.setattr(parts_module, "_firsts", lambda *_: firsts)
        sharding = Sharding(world_size=ranks, **sizes)
        every = (sharding.owned(rank) for rank in range(ranks))
        rows = (range(owned.start, owned.stop) for owned in every)
        return [len(files_with_rows(manifest, "", one)) for one in rows]

    assert sum(opens(1024, 768)) == sum(opens(768, 1024)) == 1536
    assert {*opens(1024, 768)} == {2}
    assert sorted({*opens(768, 1024)}) == [1, 2]
    assert opens(1024, 1024) == [1] * 1024


def old_on_rank(rank, world_size, path):
    _, model = normed_model()
    assert checkpoint.load(path, model, OLD_FACTS, runtime()) == 3
    own = {name: value.numpy() for name, value in statistics(model.backbone).items()}
    rows = {"centers": model.head.centers.data, **model.head.optimizer.states()}
    return own, {name: value.numpy() for name, value in rows.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_of_format_4_goes_on(ranks, tmp_path):
    """Two ranks of the version before wrote it: one checksum a file, all in the manifest."""
    path = tmp_path / "step_00000003"
    shutil.copytree(OLD, path)
    assert verify(path) is None
    found = run_on_ranks(ranks, old_on_rank, path)
    parts = [load_file(path / f"centers_{first:010d}.safetensors") for first in (0, 20)]
    for name in parts[0]:
        rows = torch.cat([torch.from_numpy(one[name]) for _, one in found])
        assert torch.equal(rows, torch.cat([part[name] for part in parts]))
    if ranks == 2:
        for rank, (own, _) in enumerate(found):
            kept = load_file(path / f"statistics_{rank:06d}.safetensors")
            assert all(torch.equal(torch.from_numpy(own[name]), kept[name]) for name in own)
    file = path / "centers_0000000020.safetensors"
    flip(file, file.stat().st_size - 1)
    words = "centers_0000000020.safetensors is corrupt: the SHA-256 of its bytes 0 to 2,880 is"
    assert words in verify(path)
    with pytest.raises((CheckpointError, AssertionError), match=words):
        run_on_ranks(ranks, old_on_rank, path)


def test_what_a_load_leaves_is_what_was_saved_in_any_size_of_pieces(tmp_path, monkeypatch):
    """Pieces end within rows and within tensors."""
    model = trained(2)
    for size in (8, 24, 1000, 4096):
        monkeypatch.setattr(pieces, "PIECE", size)
        path = save(tmp_path / str(size), 2, model)
        other = flat_model(settings())
        checkpoint.load(path, other, FACTS, runtime())
        assert all(map(torch.equal, weights(other), weights(model)))
