"""partialfc convert and the sources of partialfc pack: nothing is lost, and no JPEG is changed."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import convert, validate
from partialfc.data.dataset import open_dataset
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.pairs import read_pairs
from partialfc.data.skip_list import BadRecord, write_skip_list
from tests.support.places import FIXTURES
from tests.support.processes import partialfc

GOLDEN = FIXTURES
FACES = GOLDEN / "records" / "insightface.rec"


def samples(*paths):
    """(identity, hash of the JPEG) of every image."""
    dataset = open_dataset(paths)
    labels = dataset.labels().tolist()
    return [(label, hashlib.sha256(dataset.jpeg(i)).hexdigest()) for i, label in enumerate(labels)]


def sound(path):
    return validate.main([str(path)]) == 0


def test_a_pack_comes_back_from_the_plain_layout_byte_for_byte(tmp_path):
    plain, back = tmp_path / "plain.rec", tmp_path / "back.rec"
    assert convert.main(["pack", str(FACES), str(plain), "--layout", "plain"]) == 0
    assert open_pack(plain).declared_identities is None
    assert samples(plain) == samples(FACES)
    assert sound(plain)
    assert convert.main(["pack", str(plain), str(back)]) == 0
    for suffix in (".rec", ".idx"):
        assert back.with_suffix(suffix).read_bytes() == FACES.with_suffix(suffix).read_bytes()


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
def test_parts_of_a_pack_are_the_pack(parts, tmp_path):
    """As several packs of a run, and merged again to the same bytes."""
    assert convert.main(["split", str(FACES), str(tmp_path / "p"), "--parts", str(parts)]) == 0
    paths = sorted((tmp_path / "p").glob("*.rec"))
    assert len(paths) == parts
    assert all(sound(path) for path in paths)
    assert samples(*paths) == samples(FACES)
    sizes = [len(open_pack(path)) for path in paths]
    assert max(sizes) - min(sizes) <= 5, "an identity has five images"
    assert convert.main(["pack", *map(str, paths), str(tmp_path / "back.rec")]) == 0
    assert (tmp_path / "back.rec").read_bytes() == FACES.read_bytes()


def test_parts_are_never_empty(tmp_path):
    """One identity has nearly all images, some have none."""
    jpeg = open_pack(FACES).jpeg(0)
    labels = [1, 3] + [4] * 50 + [6]
    write_insightface_pack(tmp_path / "a.rec", [(label, jpeg) for label in labels], 8)
    words = ["split", str(tmp_path / "a.rec"), str(tmp_path / "p"), "--parts"]
    assert main(["convert", *words, "5"]) == 2
    assert convert.main([*words, "4"]) == 0
    paths = sorted((tmp_path / "p").glob("*.rec"))
    assert [len(open_pack(path)) for path in paths] == [1, 1, 50, 1]
    assert samples(*paths) == samples(tmp_path / "a.rec")
    assert open_dataset(paths).num_identities == 8


def test_dropped_records_are_gone_and_labels_have_no_gap(tmp_path):
    pack = open_pack(FACES)
    first = np.flatnonzero(pack.identities(np.arange(60)) == 3).tolist()
    write_skip_list(
        tmp_path / "bad.jsonl", [(pack, BadRecord.of(pack, i, "x")) for i in [*first, 59]]
    )
    words = ["--drop", str(tmp_path / "bad.jsonl")]
    assert convert.main(["pack", str(FACES), str(tmp_path / "a.rec"), *words]) == 0
    kept = [i for i in range(60) if i not in [*first, 59]]
    before = samples(FACES)
    expected = [(label - (label > 3), digest) for label, digest in (before[i] for i in kept)]
    assert samples(tmp_path / "a.rec") == expected
    assert open_pack(tmp_path / "a.rec").num_identities == 11
    old = json.loads((tmp_path / "a.identities.json").read_text())
    assert old == [i for i in range(12) if i != 3]
    assert sound(tmp_path / "a.rec")
    assert convert.main(["pack", str(FACES), str(tmp_path / "b.rec"), "--keep-empty", *words]) == 0
    assert samples(tmp_path / "b.rec") == [before[i] for i in kept]
    assert open_pack(tmp_path / "b.rec").num_identities == 12


def test_a_pack_goes_to_a_folder_and_back(tmp_path):
    assert convert.main(["folder", str(FACES), str(tmp_path / "f")]) == 0
    done = partialfc("pack", tmp_path / "f", tmp_path / "a.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "a.rec") == samples(FACES)


@pytest.mark.parametrize("name", ["pairs_proto4.bin", "python3_numpy2_proto2.bin"])
def test_a_bin_goes_to_a_folder_and_back(name, tmp_path):
    """JPEG bytes as they are; a set of pixels becomes .png files, and they stay that."""
    before = read_pairs(GOLDEN / "pairs" / name)
    assert convert.main(["pairs", str(GOLDEN / "pairs" / name), str(tmp_path / "f")]) == 0
    lines = (tmp_path / "f" / "pairs.txt").read_text().splitlines()
    assert [line.endswith("1") for line in lines] == before.same.tolist()
    words = ["bin", str(tmp_path / "f" / "pairs.txt"), str(tmp_path / "a.bin")]
    assert convert.main(words) == 0
    after = read_pairs(tmp_path / "a.bin")
    for image, again in zip(before.images, after.images, strict=True):
        if isinstance(image, bytes):
            assert again == image
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(again))), image)
    assert after.same.tolist() == before.same.tolist()
    assert convert.main(["pairs", str(tmp_path / "a.bin"), str(tmp_path / "g")]) == 0
    names = [sorted(file.name for file in (tmp_path / x).iterdir()) for x in "fg"]
    assert names[0] == names[1]


@pytest.mark.parametrize("line", ["a.jpg\tb.jpg", "a.jpg\tb.jpg\tyes", "a.jpg", "none\tnone\t1"])
def test_a_bad_list_of_pairs_is_refused(line, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(line + "\n")
    assert main(["convert", "bin", str(tmp_path / "a.txt"), str(tmp_path / "a.bin")]) == 2
    message = capsys.readouterr().err
    assert "none" in message if line.startswith("none") else "line 1: " in message
    assert not (tmp_path / "a.bin").exists()


def test_what_exists_is_not_replaced(tmp_path, capsys):
    (tmp_path / "a.rec").write_text("mine")
    assert main(["convert", "pack", str(FACES), str(tmp_path / "a.rec")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "a.rec").read_text() == "mine"


# Sources of partialfc pack


def member(archive, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def test_a_list_becomes_a_pack(tmp_path):
    pack = open_pack(FACES)
    lines = []
    for image in range(0, 60, 7):
        (tmp_path / f"face {image}.jpg").write_bytes(pack.jpeg(image))
        lines.append(f"face {image}.jpg\t{100 - image}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    done = partialfc("pack", tmp_path / "list.txt", tmp_path / "a.rec", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.identities.json").read_text()) == [
        str(100 - image) for image in range(56, -1, -7)
    ], "numbers in their order: 44, ..., 93, 100"
    assert [digest for _, digest in samples(tmp_path / "a.rec")] == [
        hashlib.sha256(pack.jpeg(image)).hexdigest() for image in range(56, -1, -7)
    ]
    (tmp_path / "list.txt").write_text("face.jpg\n")
    done = partialfc("pack", tmp_path / "list.txt", tmp_path / "b.rec")
    assert done.returncode == 2
    assert "line 1" in done.stderr


def test_tar_shards_become_a_pack_and_nothing_is_extracted(tmp_path):
    """WebDataset's .cls beside the image, or a folder; links and paths that climb are no images."""
    pack = open_pack(FACES)
    labels = pack.identities(np.arange(60)).tolist()
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as archive:
            for image in range(shard, 60, 3):
                if shard < 2:
                    member(archive, f"{image:05d}.jpg", pack.jpeg(image))
                    member(archive, f"{image:05d}.cls", str(labels[image]).encode())
                else:
                    member(archive, f"{labels[image]}/{image:05d}.jpg", pack.jpeg(image))
            link = tarfile.TarInfo("7/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
            member(archive, "../../climbs.txt", b"x")
    done = partialfc("pack", tmp_path / "shards", tmp_path / "a.rec", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "6 that are no images by their names" in done.stderr
    assert sorted(samples(tmp_path / "a.rec")) == sorted(samples(FACES))
    assert not list(tmp_path.rglob("climbs.txt"))
