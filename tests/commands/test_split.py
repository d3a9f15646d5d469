"""partialfc split: no identity in two parts, every image in one, one seed, one split."""

import errno
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import split
from partialfc.data.dataset import open_dataset
from partialfc.data.names import names_of
from partialfc.data.sets.pairs import read_pairs
from partialfc.data.sets.people import read_people
from tests.support.images import face


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


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Twelve people with one to six photos each, JPEG and PNG, one of them broken."""
    folder = tmp_path_factory.mktemp("faces")
    for number in range(12):
        person = folder / f"Person_{number:02d}"
        person.mkdir()
        for image in range(1 + number % 6):
            ending = "png" if image == 1 else "jpg"
            Image.fromarray(face(number, image, 40)).save(person / f"{image}.{ending}")
    (folder / "Person_05" / "0.jpg").write_bytes(b"\xff\xd8 no image")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
        (folder / hidden / "0.jpg").write_bytes(b"no person")
    return folder


def listed(folder):
    """The pairs of a list, as people and as files."""
    lines = [line.split("\t") for line in (folder / "pairs.txt").read_text().splitlines()]
    assert all((folder / path).is_file() for line in lines for path in line[:2])
    return [(a, b, same == "1") for a, b, same in lines]


def test_pairs_are_of_held_out_people_half_of_them_of_one_and_a_seed_decides(faces, tmp_path):
    words = ["--test", "0.5", "--validation", "0", "--pairs", "20"]
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert split.main([str(faces), str(tmp_path / out), *words, "--seed", str(seed)]) == 0
    pairs = listed(tmp_path / "a" / "test")
    assert [same for *_, same in pairs] == [True, False] * 10, "each fold has both kinds"
    assert all((a.split("/")[0] == b.split("/")[0]) is same for a, b, same in pairs)
    assert len({frozenset(pair[:2]) for pair in pairs}) == 20, "no pair twice, none with itself"
    assert not any("Person_05/0.jpg" in pair for pair in pairs), "it cannot be read"
    found = read_pairs(tmp_path / "a" / "test.bin")
    assert found.same.tolist() == [same for *_, same in pairs]
    assert all(image[:2] == b"\xff\xd8" for image in found.images), "PNG is stored as JPEG"
    assert not (tmp_path / "a" / "validation.bin").exists(), "nobody is in that part"
    together = [(tmp_path / name / "test.bin").read_bytes() for name in "abc"]
    assert together[0] == together[1] != together[2]


def test_people_take_turns_in_pairs_however_many_photos_they_have(tmp_path):
    images = {f"p{n}": [Path(f"p{n}/{i}") for i in range(2)] for n in range(9)}
    images["many"] = [Path(f"many/{i}") for i in range(60)]
    pairs, _ = split.drawn_pairs(images, 40, 0, lambda image: b"")
    of_one = [left.parent.name for left, right in pairs if left.parent == right.parent]
    assert len(of_one) == 20
    assert {of_one.count(f"p{n}") for n in range(9)} == {1}, "each has one pair, and gives it"
    of_two = [{left.parent, right.parent} for left, right in pairs if left.parent != right.parent]
    assert len({frozenset(two) for two in of_two}) == 20, "no two people twice while others wait"


def test_more_pairs_than_there_are_leave_nothing_behind(faces, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["split", str(faces), str(out), "--test", "0.3", "--pairs", "2000"]) == 2
    assert re.search(r"held-out people give \d+ such pairs. Ask for \d+", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_what_split_makes_trains_as_it_is(faces, tmp_path):
    """Training follows no symbolic link, also not those that were in the folder."""
    linked = tmp_path / "linked"
    for image in faces.rglob("[0-9].*"):
        target = linked / image.relative_to(faces)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(image)
    assert split.main([str(linked), str(tmp_path / "out"), "--test", "0.3"]) == 0
    dataset = open_dataset([tmp_path / "out" / "train"])
    assert names_of(dataset) == sorted(p.name for p in (tmp_path / "out" / "train").iterdir())
    for image in range(len(dataset)):
        pack, place = dataset.locate(image)
        assert len(pack.jpeg(place)) > 100 or "Person_05" in pack.index.name(place)
    one = next((tmp_path / "out" / "train").rglob("*.png"))
    assert one.stat().st_nlink > 1, "a hard link, which takes no space"


def test_where_the_file_system_has_no_links_images_are_copied_and_it_is_said(
    photos, tmp_path, capsys, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert split.main([str(photos), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{len(contents(tmp_path / 'out')):,} images are copies" in said
    assert contents(tmp_path / "out" / "train") != {}


def test_the_people_of_a_list_are_trained_on_and_all_others_are_held_out(faces, tmp_path, capsys):
    people = tmp_path / "peopleDevTrain.txt"
    people.write_text("3\nPerson_03\t4\nPerson_11\t6\nNobody_Here\t1\n")
    words = [str(faces), str(tmp_path / "out"), "--people", str(people), "--validation", "0"]
    assert split.main(words) == 0
    assert "1 of 3 people have no folder with images: Nobody_Here" in capsys.readouterr().err
    folders = [
        sorted(p.name for p in (tmp_path / "out" / part).iterdir() if p.is_dir())
        for part in split.PARTS
    ]
    everybody = [f"Person_{number:02d}" for number in range(12)]
    assert folders[0] == ["Person_03", "Person_11"]
    assert folders[2] == [name for name in everybody if name not in folders[0]]
    with pytest.raises(SystemExit):
        split.main([*words[:1], str(tmp_path / "two"), *words[2:], "--test", "0.1"])
    people.write_text("nobody\n")
    assert main(["split", *words[:1], str(tmp_path / "two"), *words[2:]]) == 2
    assert "none of its 1 people, such as 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2\nA_B\t1\nC\t7\n", ["A_B", "C"]),
        ("2\n1\nA_B\t1\n2\nC\t7\nD\t1\n", ["A_B", "C", "D"]),
        ("\ufeff000\r\n001\r\n\r\n", ["000", "001"]),
        ("Ann Lee\nBo\nAnn Lee\n", ["Ann Lee", "Bo"]),
        ("3\nA_B\t1\nC\t7\n", None),
        ("2\n1\nA_B\t1\n2\nC\t7\n", None),
        ("", None),
    ],
)
def test_lists_of_people_are_read_as_they_are_published(tmp_path, text, names):
    path = tmp_path / "people.txt"
    path.write_bytes(text.encode())
    if names is None:
        with pytest.raises(ValueError, match=r"people\.txt: "):
            read_people(path)
    else:
        assert read_people(path) == names
