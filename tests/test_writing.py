"""A file is replaced whole or stays as it was, and nothing is left beside it."""

import os
import stat
import threading

import pytest

from partialfc.writing import atomic_write, opened, write_json, write_text
from tests.support.waiting import PATIENCE


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "note.json"
    write_text(path, "old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent, "a rename over file systems is a copy"
    assert path.read_text() == "new"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def stopped():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_what_is_written_is_made(tmp_path):
    """embed did an hour's work and then missed the folder of its --out."""
    write_text(tmp_path / "new" / "deep" / "x.csv", "1")
    assert (tmp_path / "new" / "deep" / "x.csv").read_text() == "1"


def test_a_long_name_in_another_script_is_written(tmp_path):
    """Names are limited in bytes, and the one beside it was longer."""
    path = tmp_path / f"{'脸' * 80}.json"
    write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "missing").write_text("a file")
    with pytest.raises(OSError, match="missing"):
        write_text(tmp_path / "missing" / "note.txt", "x")


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "x")
    reader.join(PATIENCE)
    assert read == ["x"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("made", "replaced"):
        write_text(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert [*file.parent.iterdir()] == [file]


def test_nobody_can_guess_or_prepare_where_it_is_written_first(tmp_path):
    """In a folder that others can write to, a link there had a stranger's file overwritten."""
    path, names = tmp_path / "note.txt", set()
    for text in ("a", "b"):
        with atomic_write(path) as partial:
            assert partial.is_file(), "made before it is handed out: no link can take its place"
            names.add(partial.name)
            partial.write_text(text)
    assert len(names) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a link in another's name")
def test_a_link_that_somebody_else_made_is_not_followed(tmp_path):
    stranger, link = tmp_path / "stranger", tmp_path / "metrics.jsonl"
    stranger.write_text("mine")
    link.symlink_to(stranger)
    os.lchown(link, 12345, 12345)
    with pytest.raises(OSError, match="somebody else made it a link"):
        write_text(link, "x")
    with pytest.raises(OSError, match="somebody else made it a link"):
        opened(link, os.O_WRONLY | os.O_CREAT)
    assert stranger.read_text() == "mine"
    assert link.is_symlink()
