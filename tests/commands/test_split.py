"""partialfc split: no identity in two parts, every image in one, one seed, one split."""

import re
from pathlib import Path

import pytest

from partialfc.__main__ import main
from partialfc.commands import split


@pytest.fixture
def photos(tmp_path):
    """Twenty identities with one to four images, and what is not an image."""
    for number in range(20):
        folder = tmp_path / "photos" / f"person {number:02d}"
        folder.mkdir(parents=True)
        for image in range(1 + number % 4):
            (folder / f"{image}.jpg").write_bytes(f"{number} {image}".encode())
        (folder / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def contents(folder: Path) -> dict[str, bytes]:
    """Path inside the folder -> what is in the image."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


@pytest.mark.parametrize("put", ["symlink", "hardlink", "copy"])
def test_every_image_is_in_one_part_and_no_identity_in_two(photos, tmp_path, put):
    out = tmp_path / "deep" / "split"
    out.parent.mkdir()
    arguments = [str(photos), str(out), "--validation", "0.2", "--test", "0.3", "--put", put]
    assert split.main(arguments) == 0
    parts = {part: contents(out / part) for part in ("train", "validation", "test")}
    together = {path: data for part in parts.values() for path, data in part.items()}
    assert together == contents(photos)
    assert sum(map(len, parts.values())) == len(together)
    identities = {part: {path.split("/")[0] for path in images} for part, images in parts.items()}
    assert [len(identities[part]) for part in parts] == [10, 4, 6]
    assert len(set.union(*identities.values())) == 20, "an identity is in two parts"


def test_the_lists_are_of_test_identities_with_and_without_a_pair(photos, tmp_path):
    assert split.main([str(photos), str(tmp_path / "out"), "--test", "0.5"]) == 0
    test = tmp_path / "out" / "test"
    lists = {}
    for name in ("query", "distractors"):
        lines = [line.split("\t") for line in (test / f"{name}.txt").read_text().splitlines()]
        assert all((test / path).is_file() and path.split("/")[0] == who for path, who in lines)
        lists[name] = [who for _, who in lines]
    identities = {path.name for path in test.iterdir() if path.is_dir()}
    assert set(lists["query"]) | set(lists["distractors"]) == identities
    assert not set(lists["query"]) & set(lists["distractors"])
    assert len(set(lists["query"])) == 5
    assert all(lists["query"].count(who) > 1 for who in lists["query"])


def test_a_seed_decides(photos, tmp_path):
    trained = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert split.main([str(photos), str(tmp_path / out), "--seed", str(seed)]) == 0
        trained.append(contents(tmp_path / out / "train"))
    assert trained[0] == trained[1] != trained[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test", "1.5"], r"--test must be in \[0, 1\), got 1.5"),
        (["--test", "0.5", "--validation", "0.5"], "leave nothing to train"),
        (["--put", "move"], "invalid choice"),
    ],
)
def test_mistakes_are_named(photos, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        split.main([str(photos), str(tmp_path / "out"), *words])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_identities_and_one_that_exists_are_refused(photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["split", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "one folder of images per identity" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        split.main([str(photos), str(tmp_path / "empty")])
