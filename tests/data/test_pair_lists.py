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
    pairs = read_pair_list(path, lfw)
    assert [(pair.first.name, pair.second.name, pair.same) for pair in pairs] == [
        ("Anna B_0001.jpg", "Anna B_0002.jpg", True),
        ("Bert_0001.jpg", "Bert_0002.jpg", True),
        ("Anna B_0001.jpg", "Bert_0001.jpg", False),
        ("Bert_0002.jpg", "Cleo_0001.jpeg", False),
    ]
    words = ["convert", "bin", str(path), str(tmp_path / "a.bin"), "--images", str(lfw)]
    assert main(words) == 0
    found = read_pairs(tmp_path / "a.bin")
    assert found.same.tolist() == [True, True, False, False]
    assert found.images[7] == (lfw / "Cleo" / "Cleo_0001.jpeg").read_bytes()


def test_a_list_of_other_length_than_it_promises_is_read_and_said(lfw, tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(LFW.replace("1\t2", "10\t300", 1))
    with pytest.warns(UserWarning, match="promises 6,000 pairs, and it has 4"):
        assert len(read_pair_list(path, lfw)) == 4


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


def test_what_is_no_list_is_refused(lfw, tmp_path):
    path = tmp_path / "pairs.txt"
    for data, message in ((b"", "has no line"), (b"\xff\xfea\0", "must be text in UTF-8")):
        path.write_bytes(data)
        with pytest.raises(PairsError, match=message):
            read_pair_list(path, lfw)
    path.write_text("/dev/zero\t/dev/zero\t1\n")  # it would be read until the memory is full
    with pytest.raises(PairsError, match=r"line 1: .*is no file"):
        read_pair_list(path, lfw)
