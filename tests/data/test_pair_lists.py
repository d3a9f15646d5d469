"""Lists of pairs: ours and LFW's own are read, each line is checked, and convert makes a .bin."""

import numpy as np
import pytest

from partialfc.__main__ import main
from partialfc.data.images.jpeg import encode
from partialfc.data.sets.pair_lists import read_pair_list
from partialfc.data.sets.pairs import PairsError, read_pairs

LFW = "1\t2\nAnna B\t1\t2\nBert\t1\t2\nAnna B\t1\tBert\t1\nBert\t2\tCleo\t1\n"


@pytest.fixture
def lfw(tmp_path):
    """Three people as LFW has them; images told apart by their colour."""
    for person, name in enumerate(("Anna B", "Bert", "Cleo")):
        (tmp_path / "lfw" / name).mkdir(parents=True)
        for number in (1, 2):
            pixels = np.full((8, 8, 3), 60 * person + 20 * number, np.uint8)
            ending = "jpeg" if name == "Cleo" else "jpg"
            path = tmp_path / "lfw" / name / f"{name}_000{number}.{ending}"
            path.write_bytes(encode(pixels))
    return tmp_path / "lfw"


@pytest.mark.parametrize("head", ["1\t2\n", "2\n", "\ufeff1\t2\r\n\n"])
def test_lfws_lists_are_read(head, lfw, tmp_path):
    """pairs.txt has folds and pairs on its first line, pairsDevTest.txt pairs alone."""
    path = tmp_path / "pairs.txt"
    path.write_text(LFW.replace("1\t2\n", head, 1), encoding="utf-8")
    folder, pairs = read_pair_list(path, lfw)
    assert folder == lfw
    with_folds = "\t" in head
    order = (0, 1, 2, 3) if with_folds else (0, 2, 1, 3)  # else no fold would have both kinds
    pairs = [pairs[i] for i in order]
    assert [(pair.first.name, pair.second.name, pair.same) for pair in pairs] == [
        ("Anna B_0001.jpg", "Anna B_0002.jpg", True),
        ("Bert_0001.jpg", "Bert_0002.jpg", True),
        ("Anna B_0001.jpg", "Bert_0001.jpg", False),
        ("Bert_0002.jpg", "Cleo_0001.jpeg", False),
    ]
    words = ["convert", "bin", str(path), str(tmp_path / "a.bin"), "--images", str(lfw)]
    assert main(words) == 0
    found = read_pairs(tmp_path / "a.bin")
    assert found.same.tolist() == [(True, True, False, False)[i] for i in order]
    assert found.images[7] == (lfw / "Cleo" / "Cleo_0001.jpeg").read_bytes()


def test_a_list_of_other_length_than_it_promises_is_read_and_said(lfw, tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(LFW.replace("1\t2", "10\t300", 1))
    with pytest.warns(UserWarning, match="promises 6,000 pairs, and it has 4"):
        assert len(read_pair_list(path, lfw)[1]) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Anna B\t1\t9", "line 2: 'Anna B 1 9': .*Anna B_0009.jpg is not there: name the folder"),
        ("Dora\t1\t2", "Dora_0001.jpg is not there"),
        ("../lfw/Bert\t1\t2", "must be a person's name and the number of an image"),
        ("Bert\t1\t..\t2", "must be a person's name"),
        ("Bert\tone\t2", "must be a person's name"),
        ("Bert\t1", "must be name, n, m or name, n, name, m"),
    ],
)
def test_a_line_of_lfws_that_cannot_be_used_is_refused(line, message, lfw, tmp_path):
    (tmp_path / "pairs.txt").write_text(f"1\n{line}\n", encoding="utf-8")
    with pytest.raises(PairsError, match=message):
        read_pair_list(tmp_path / "pairs.txt", lfw)


def test_a_pair_without_its_image_is_left_out_and_counted(lfw, tmp_path):
    """A photo in which no face was found, say: the other pairs are measured."""
    path = tmp_path / "pairs.txt"
    path.write_text(LFW)
    (lfw / "Bert" / "Bert_0002.jpg").unlink()
    with pytest.warns(UserWarning, match=r"2 of 4 pairs .* left out. The first: .*line 3: 'Bert 1"):
        _, pairs = read_pair_list(path, lfw)
    assert [pair.second.name for pair in pairs] == ["Anna B_0002.jpg", "Bert_0001.jpg"]


@pytest.fixture
def cfp(tmp_path):
    """CFP in small: three people with two frontal images and one of the side."""
    lists = {"F": [], "P": []}
    for person in range(1, 4):
        for kind, folder, count in (("F", "frontal", 2), ("P", "profile", 1)):
            for image in range(1, count + 1):
                name = f"Data/Images/{person:03d}/{folder}/{image:02d}.jpg"
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(encode(np.full((8, 8, 3), 50 * person, np.uint8)))
                lists[kind].append(f"{len(lists[kind]) + 1} ../{name}\n")
    for kind, lines in lists.items():
        path = tmp_path / "Protocol" / f"Pair_list_{kind}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    for kind, same, diff in (("FF", "1,2\n", "1,3\n"), ("FP", "3,2\n4,2\n", "6,1")):
        for fold in ("01", "02"):
            folder = tmp_path / "Protocol" / "Split" / kind / fold
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text(same)
            (folder / "diff.txt").write_text(diff)
    return tmp_path


def test_cfps_folders_are_read_fold_by_fold_with_its_images_or_aligned_ones(cfp, tmp_path):
    split = cfp / "Protocol" / "Split"
    folder, pairs = read_pair_list(split / "FP")
    assert folder == cfp / "Data" / "Images"
    fold = [
        ("002/frontal/01.jpg", "002/profile/01.jpg", True),
        ("002/frontal/02.jpg", "002/profile/01.jpg", True),
        ("003/frontal/02.jpg", "001/profile/01.jpg", False),
    ]
    assert [(str(one), str(other), same) for one, other, same in pairs] == fold * 2
    aligned = tmp_path / "aligned"
    folder.rename(aligned)
    pairs = read_pair_list(split / "FF", aligned)[1]
    assert [str(pair.second) for pair in pairs[:2]] == ["001/frontal/02.jpg", "002/frontal/01.jpg"]
    words = ["convert", "bin", str(split / "FF"), str(tmp_path / "ff.bin")]
    assert main([*words, "--images", str(aligned)]) == 0
    assert read_pairs(tmp_path / "ff.bin").same.tolist() == [True, False] * 2


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Split/FP/01/diff.txt", "7,1\n", "line 1: '7,1': must be two numbers of images"),
        ("Split/FP/02/same.txt", "1\n", "must be two numbers of images"),
        ("Pair_list_P.txt", "1 ../../etc/passwd\n", "must be a number and"),
        ("Pair_list_P.txt", "1 a/../b.jpg\n", "must be a number and"),
    ],
)
def test_a_line_of_cfps_that_cannot_be_used_is_refused(cfp, file, text, message):
    (cfp / "Protocol" / file).write_text(text)
    with pytest.raises(PairsError, match=message):
        read_pair_list(cfp / "Protocol" / "Split" / "FP")


def test_what_is_no_list_is_refused(lfw, tmp_path):
    path = tmp_path / "pairs.txt"
    for data, message in ((b"", "has no line"), (b"\xff\xfea\0", "must be text in UTF-8")):
        path.write_bytes(data)
        with pytest.raises(PairsError, match=message):
            read_pair_list(path, lfw)
    path.write_text("/dev/zero\t/dev/zero\t1\n")  # it would be read until the memory is full
    with pytest.raises(PairsError, match=r"line 1: .*is no file"):
        read_pair_list(path, lfw)
