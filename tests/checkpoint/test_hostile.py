"""R19: a damaged or hostile checkpoint costs itself, in bounded time; another format is none."""

import hashlib
import os

import pytest

from partialfc.checkpoint import CheckpointError
from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.errors import OtherFormatError
from tests.checkpoint.test_checkpoint import FACTS, names, save, signed, trained
from tests.support.models import runtime


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints; the newest is to be spoilt."""
    for step in (1, 2):
        save(tmp_path, step)
    return tmp_path / "step_00000002"


def falls_back(path):
    """Whether the one before it is taken and it is set aside."""
    assert checkpoint.verify(path)
    assert checkpoint.newest(path.parent, runtime()).name == "step_00000001"
    return names(path.parent) == [".step_00000002.invalid", "step_00000001"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"sha256": ' + '{"a": ' * 100_000,
        "[]",
        "7",
        '"x"',
        "null",
        '{"sha256": "\\ud800"}',
        "\0" * 4096,
        '{"sha256": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "deep object", "list", "number", "text", "null", "surrogate", "zeros", "digits"],
)
def test_a_manifest_that_is_none_costs_its_checkpoint(saved, text):
    (saved / "manifest.json").write_text(text)
    assert falls_back(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": None},
        {"files": {"\ud800.safetensors": {}}},
        {"files": {"../../x": {}}},
        {"files": {"a\0b": {}}},
        {"files": {"centers_x.safetensors": {"bytes": 1, "sha256": "", "tensors": []}}},
        {"files": {"backbone.safetensors": []}},
        {"files": {"backbone.safetensors": {"bytes": 1, "sha256": "", "tensors": 7}}},
        {"facts": [1]},
        {"step": "2"},
        {"step": 10**30},
        {"step": True},
        {"world_size": -1},
    ],
    ids=str,
)
def test_what_a_manifest_says_is_looked_at_even_with_its_checksum(saved, change):
    signed(saved, lambda manifest: manifest.update(change))
    assert falls_back(saved)


@pytest.mark.parametrize("name", ["manifest.json", "backbone.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "endless", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(saved, name, what):
    """A pipe is waited for, and /dev/zero is read, for ever."""
    (saved / name).unlink()
    if name != "manifest.json":
        signed(saved, lambda manifest: manifest["files"][name].update(bytes=0))
    if what == "pipe":
        os.mkfifo(saved / name)
    elif what == "endless":
        (saved / name).symlink_to("/dev/zero")
    elif what == "folder":
        (saved / name).mkdir()
    assert falls_back(saved)


@pytest.mark.parametrize("other", [2, 6, "6", None])
def test_another_format_is_refused_and_nothing_is_set_aside(saved, other):
    """A run went back to an older checkpoint, and deleted newer ones as it came to them."""
    signed(saved, lambda manifest: manifest.update(format=other))
    before = names(saved.parent)
    with pytest.raises(OtherFormatError, match=rf"step_00000002: its format is {other!r}, and"):
        checkpoint.newest(saved.parent, runtime())
    with pytest.raises(CheckpointError, match="Go on with the version that wrote it"):
        checkpoint.named(saved, runtime())
    assert names(saved.parent) == before


def test_a_flipped_bit_is_no_other_format(saved):
    text = (saved / "manifest.json").read_text()
    format = f'"format": {checkpoint_folder.FORMAT}'
    assert format in text
    (saved / "manifest.json").write_text(text.replace(format, '"format": 7'))
    assert falls_back(saved)


def test_tensors_that_are_none_are_a_typed_error(saved, tmp_path):
    """Everything is as the manifest says, and still no safetensors."""
    content = b"\xff" * 64
    (saved / "backbone.safetensors").write_bytes(content)
    about = {"bytes": 64, "sha256": hashlib.sha256(content).hexdigest()}
    signed(saved, lambda manifest: manifest["files"]["backbone.safetensors"].update(about))
    assert checkpoint.verify(saved) is None
    with pytest.raises(CheckpointError, match="step_00000002"):
        checkpoint.load(saved, trained(), FACTS, runtime())


def test_folders_with_other_names_are_no_checkpoints(saved):
    for name in ("step_" + "9" * 30, "step_٠٠٠٠٠٠٠٩", "step_00000003_mine"):
        (saved.parent / name).mkdir()
    assert checkpoint.newest(saved.parent, runtime()) == saved


def test_a_leftover_that_is_a_link_is_removed_and_what_it_names_is_not(saved, tmp_path):
    """It stopped the start; a link to nothing stopped the save."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo").write_text("x")
    for name in (".step_00000003.partial", ".step_00000001.deleted"):
        (saved.parent / name).symlink_to(mine)
    assert checkpoint.newest(saved.parent, runtime()) == saved
    for target in (mine, tmp_path / "nothing"):
        (saved.parent / ".step_00000003.partial").symlink_to(target)
        (saved.parent / ".step_00000001.deleted").symlink_to(target)
        save(saved.parent, 3, keep=1)
        (saved.parent / "step_00000003").rename(tmp_path / f"saved_{target.name}")
        save(saved.parent, 1)
    assert [path.name for path in mine.iterdir()] == ["photo"]
