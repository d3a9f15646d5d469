"""A file is replaced whole or stays as it was, and nothing is left beside it."""

import pytest

from partialfc.writing import atomic_write, write_json, write_text


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


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="missing"):
        write_text(tmp_path / "missing" / "note.txt", "x")
