"""Copies in the memory of hosts: what counts as one, and who keeps whose."""

import json
import os

import pytest
import torch

from partialfc.checkpoint.folder import MANIFEST
from partialfc.checkpoint.peers.hosts import Line, keepers
from partialfc.checkpoint.peers.memory import ABOUT, COMMON, Memory, name_of, note_of
from partialfc.checkpoint.peers.recovery import find
from partialfc.distributed.ranks import Ranks

RUN, START, OTHER = "a" * 32, "b" * 32, "c" * 32
LINE = Line(RUN, START)


def fill(memory, origin, *, step=6, start=START, generation=0, says=None, world=2):
    """Write a part as a rank does."""
    slot = memory.slot(start, name_of(0, origin, generation))
    rows = {"centers": torch.arange(12.0).view(3, 4), "momentum": torch.ones(3, 1)}
    file = "backbone.safetensors" if origin == COMMON else f"centers_{3 * origin:010d}.safetensors"
    for name, target in slot.begin({file: rows})[file].items():
        target.copy_(rows[name])
    about = {"start": start, "origin": origin, "base": 0, **(says or {})}
    manifest = {
        "step": step,
        "world_size": world,
        "num_identities": 6,
        "canonical_shards": 2,
        "facts": {},
        "scaler": {},
        "settings": "",
        "versions": {},
        ABOUT: about,
    }
    whole = slot.mapped[file]
    slot.commit(manifest, {file: note_of(whole, rows)})
    return slot.path / file


@pytest.fixture
def memory(tmp_path):
    return Memory(tmp_path, RUN)


def whole(memory, **about):
    return [fill(memory, origin, **about) for origin in (COMMON, 0, 1)]


def found(memory, line=LINE):
    step = find(memory, line, [0], Ranks())
    return None if step is None else (step.start, step.step)


def test_the_newest_step_that_is_whole_counts(memory):
    whole(memory, step=4, generation=0)
    whole(memory, step=6, generation=1)
    assert found(memory) == (START, 6)


def test_a_kill_in_the_middle_of_copying_leaves_the_generation_before(memory):
    """The slot that is written over is no part from the first byte on."""
    whole(memory, step=4, generation=0)
    whole(memory, step=6, generation=1)
    slot = memory.slot(START, name_of(0, 1, 1))
    slot.begin({"centers_0000000003.safetensors": {"centers": torch.zeros(3, 4)}})
    assert found(memory) == (START, 4)


def torn(file):
    os.truncate(file, file.stat().st_size - 1)


def longer(file):
    with file.open("ab") as opened:
        opened.write(b"0")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def gone(file):
    file.unlink()


def manifest_gone(file):
    (file.parent / MANIFEST).unlink()


def manifest_changed(file):
    path = file.parent / MANIFEST
    path.write_text(path.read_text().replace('"step": 6', '"step": 8'))


def manifest_is_deep(file):
    (file.parent / MANIFEST).write_text("[" * 100_000)


def is_a_link(file):
    elsewhere = file.parent.parent / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [torn, longer, flipped, gone, manifest_gone, manifest_changed, manifest_is_deep, is_a_link],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_torn_or_changed_is_no_copy(memory, damage, which, capsys):
    whole(memory, step=4, generation=0)
    damage(whole(memory, step=6, generation=1)[which])
    assert found(memory) == (START, 4)


@pytest.mark.parametrize(
    "about",
    [
        {"start": OTHER},
        {"says": {"start": OTHER}},
        {"says": {"origin": 7}},
        {"says": {"origin": "1"}},
        {"says": {"base": True}},
        {"world": 1},
        {"world": 2**62},
        {"step": 4},
    ],
)
def test_what_is_of_another_start_rank_or_step_is_no_part_of_a_copy(memory, about, capsys):
    fill(memory, COMMON)
    fill(memory, 0)
    fill(memory, 1, **about)
    assert found(memory) is None


def test_another_runs_copies_are_not_even_looked_at(memory, tmp_path):
    whole(Memory(tmp_path, OTHER))
    assert found(memory) is None


def test_a_start_goes_on_from_its_own_copies_or_from_those_that_it_began_with(memory):
    """Not from a step that the run has left behind, however new it was."""
    whole(memory, step=6, generation=0)
    whole(memory, step=8, generation=1)
    later = Line(RUN, OTHER, before=(START, 6))
    assert found(memory, later) == (START, 6)
    whole(memory, step=7, start=OTHER)
    assert found(memory, later) == (OTHER, 7)
    assert found(memory, Line(RUN, OTHER)) == (OTHER, 7)
    assert found(memory, Line(RUN, "d" * 32)) is None


def test_a_slot_is_used_again_in_the_same_memory(memory):
    """Or each copy would wait for new pages."""
    first = fill(memory, 0, step=4)
    slot, rows = memory.slot(START, name_of(0, 0, 0)), {"centers": torch.zeros(3, 4)}
    slot.begin({first.name: rows})
    again = (slot.folder / first.name).stat().st_ino
    slot.begin({first.name: rows})
    assert (slot.folder / first.name).stat().st_ino == again


def test_a_folder_that_others_may_open_is_refused(tmp_path):
    folder = tmp_path / f"partialfc-{RUN}"
    folder.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="of this user alone"):
        Memory(tmp_path, RUN)
    folder.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="of this user alone"):
        Memory(tmp_path, RUN)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "x"}', "[" * 100_000, '{"run": 1}'])
def test_a_damaged_line_accepts_nothing(tmp_path, text):
    path = tmp_path / "peers.json"
    path.write_text(text)
    assert Line.read(path) is None


def test_a_line_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "peers.json"
    line = Line.new().next((START, 6))
    line.write(path)
    assert Line.read(path) == line
    said = json.loads(path.read_text())
    for before in ([START], [START, "6"], ["x", 6], [START, True], "ab"):
        path.write_text(json.dumps({**said, "before": before}))
        assert Line.read(path) is None


@pytest.mark.parametrize(
    "hosts",
    [[0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [5, 5, 5, 2, 2, 9, 9, 9], [0] * 8 + [1] * 8 + [2] * 7],
)
def test_each_part_is_kept_on_another_host_and_each_rank_keeps_one(hosts):
    found = keepers(hosts)
    assert sorted(found) == [*range(len(hosts))]
    assert all(hosts[rank] != hosts[keeper] for rank, keeper in enumerate(found))


@pytest.mark.parametrize("hosts", [[0], [0, 0], [0, 0, 0, 1]])
def test_where_other_hosts_have_too_few_ranks_nobody_keeps_a_part(hosts):
    assert keepers(hosts) is None
