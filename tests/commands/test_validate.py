"""partialfc validate: a sound pack exits with 0; every kind of damage is named and exits with 1."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands._validate.levels import share_at_most
from partialfc.commands._validate.look import Look
from partialfc.data.dataset import open_dataset
from partialfc.data.packs import index_cache
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import write_insightface_pack
from tests.support.places import FIXTURES
from tests.support.processes import partialfc

GOLDEN = FIXTURES / "records"


def damaged(folder: Path, change, name="insightface") -> Path:
    """A copy of a golden pack, after ``change(data, pack)`` on its bytes."""
    pack = open_pack(GOLDEN / f"{name}.rec")
    data = bytearray(pack.path.read_bytes())
    data = change(data, pack) or data
    path = folder / "a.rec"
    path.write_bytes(data)
    (folder / "a.idx").write_bytes((GOLDEN / f"{name}.idx").read_bytes())
    return path


def run(*words) -> int:
    return main(["validate", *map(str, words)])


@pytest.mark.parametrize("name", ["insightface", "plain", "labels2"])
def test_a_sound_pack_passes_every_level(name, tmp_path):
    """As a user runs it; the packs are mxnet's own."""
    for suffix in (".rec", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((GOLDEN / f"{name}{suffix}").read_bytes())
    words = [
        tmp_path / "a.rec",
        "--level",
        "hash",
        "--json",
        tmp_path / "r",
        "--bad",
        tmp_path / "b",
    ]
    done = partialfc("validate", *words)
    assert done.returncode == 0, done.stderr
    assert "in reads of" in done.stderr, "the cost, announced"
    report = json.loads((tmp_path / "r").read_text())
    assert report["sound"]
    assert list(report["levels"]) == ["index", "headers", "labels", "images", "hash"]
    assert report["levels"]["images"]["decoded"] == 60
    assert (tmp_path / "b").read_text() == ""
    labels = report["levels"]["labels"]
    assert labels["identities"] == 12
    assert labels["images_per_identity"] == {"min": 5, "median": 5.0, "max": 5}


def set_word(data, at, value):
    data[at : at + 4] = struct.pack("<I", value)


def set_label(data, at, value):
    data[at + 12 : at + 16] = struct.pack("<f", value)


HEADER_DAMAGE = {
    "magic": (lambda d, p: set_word(d, p.offset(7), 0xCED7230B), "magic 0xced7230b"),
    "cflag": (lambda d, p: set_word(d, p.offset(7) + 4, 3 << 29 | 100), "part kind 3"),
    "long": (lambda d, p: set_word(d, p.offset(7) + 4, (1 << 29) - 1), "bytes are left"),
    "short": (lambda d, p: set_word(d, p.offset(7) + 4, 100), "the next one begins at"),
    "flag": (lambda d, p: set_word(d, p.offset(7) + 8, 0xFFFFFFFF), "needs as many labels"),
    "nan": (lambda d, p: set_label(d, p.offset(7), np.nan), "label nan must be a whole number"),
    "half": (lambda d, p: set_label(d, p.offset(7), 1.5), "label 1.5 must be"),
    "minus": (lambda d, p: set_label(d, p.offset(7), -1), "label -1 must be"),
    "C": (
        lambda d, p: set_label(d, p.offset(7), 12),
        "label 12 must be a whole number in [0, ",
    ),
}


@pytest.mark.parametrize("kind", HEADER_DAMAGE)
def test_damage_in_a_header_is_found_named_and_can_be_skipped(kind, tmp_path, capsys):
    """The list goes into data.skip, and what is left can be read to the last image."""
    change, message = HEADER_DAMAGE[kind]
    path = damaged(tmp_path, change)
    bad = tmp_path / "bad.jsonl"
    assert run(path, "--level", "headers", "--bad", bad) == 1
    pack = open_pack(path)
    out = capsys.readouterr().out
    assert f"bad: image 7, key 8, offset {pack.offset(7)}: " in out
    assert message in out
    entry = json.loads(bad.read_text())
    assert (entry["image"], entry["key"], entry["offset"]) == (7, 8, pack.offset(7))
    dataset = open_dataset([path], [bad])
    assert len(dataset) == 59
    assert len(dataset.identities(np.arange(59))) == 59
    for sample in range(59):
        dataset.jpeg(sample)


def truncated_jpeg(data, pack):
    view = pack.jpeg(9)
    at = bytes(data).index(view)
    end = at + len(view)
    data[end - 2 : end] = b"\0\0"


def bad_table(data, pack):
    """Damage that only a decoder sees."""
    view = pack.jpeg(9)
    at = bytes(data).index(view) + view.index(b"\xff\xc4") + 5
    data[at : at + 16] = b"\xff" * 16


@pytest.mark.parametrize("change", [truncated_jpeg, bad_table])
def test_an_image_that_cannot_be_decoded_is_found_at_level_images_only(change, tmp_path, capsys):
    path = damaged(tmp_path, change)
    assert run(path, "--level", "headers") == 0
    assert run(path, "--images", "all", "--json", tmp_path / "r") == 1
    assert "bad: image 9, key 10, " in capsys.readouterr().out
    images = json.loads((tmp_path / "r").read_text())["levels"]["images"]
    assert (images["decoded"], images["bad"], images["bad_share_at_most"]) == (60, 1, 1 / 60)


def test_damage_of_the_index_or_the_end_of_the_file(tmp_path, capsys):
    path = damaged(tmp_path, lambda data, pack: data + bytes(4096))
    assert run(path, "--level", "index") == 1
    assert "4096 bytes follow the last record" in capsys.readouterr().out
    path = damaged(tmp_path, lambda data, pack: data[: len(data) // 2])
    assert run(path, "--json", tmp_path / "r") == 1
    assert "inside the .rec of" in capsys.readouterr().out
    assert "inside the .rec of" in json.loads((tmp_path / "r").read_text())["problem"]
    path = damaged(tmp_path, lambda data, pack: None, "plain")
    lines = (tmp_path / "a.idx").read_text().splitlines()
    (tmp_path / "a.idx").write_text("".join(f"{line}\n" for line in lines[1:]))
    assert run(path, "--level", "index") == 1
    assert "the first record must be at offset 0" in capsys.readouterr().out


def test_what_cannot_be_checked_is_exit_code_2(tmp_path, capsys):
    assert run(tmp_path / "none.rec") == 2
    assert "none.rec" in capsys.readouterr().err
    assert run(GOLDEN / "plain.rec", "--images", "0") == 2
    assert "--images must be a whole number >= 1" in capsys.readouterr().err


def test_labels_tell_empty_and_lonely_identities(tmp_path, capsys):
    jpeg = open_pack(GOLDEN / "plain.rec").jpeg(0)
    labels = [1, 1, 2, 4, 4]
    write_insightface_pack(tmp_path / "a.rec", [(label, jpeg) for label in labels], 7)
    assert run(tmp_path / "a.rec", "--level", "labels") == 0
    out = capsys.readouterr().out
    for hint in (
        "the smallest label is 1, not 0",
        "the largest label is 4, not 6",
        "4 of 7 identities have no image",
        "1 of 7 identities have one image",
    ):
        assert f"hint: {hint}" in out


@pytest.mark.parametrize(("bad", "count"), [(0, 30_000), (3, 30_000), (1, 60), (60, 60)])
def test_the_largest_likely_share_is_clopper_and_pearsons(bad, count):
    """Against scipy's beta distribution; none of 30,000 is the 0.01 % of the field's checks."""
    from scipy.stats import beta  # a second for each process that collects tests

    expected = 1.0 if bad == count else beta.ppf(0.95, bad + 1, count - bad)
    assert share_at_most(bad, count) == pytest.approx(expected, rel=1e-6)


def face(seed: int) -> np.ndarray:
    """A skin-coloured oval with two dark eyes, and noise of its own."""
    y, x = np.mgrid[:112, :112]
    image = np.full((112, 112, 3), (60, 60, 60), float)
    image[((x - 55.5) / 40) ** 2 + ((y - 56) / 50) ** 2 < 1] = (200, 150, 120)
    for eye in (38, 73):
        image[(x - eye) ** 2 + (y - 50) ** 2 < 40] = (40, 30, 30)
    noise = np.random.default_rng(seed).normal(0, 20, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


LOOKS = {
    "sound": (lambda image, seed: image, None),
    "BGR": (lambda image, seed: image[:, :, ::-1], "written as BGR"),
    "grey": (lambda image, seed: image[:, :, :1].repeat(3, 2), None),
    "unaligned": (lambda i, s: np.roll(i, (37 * s, 53 * s), (0, 1)), "not aligned to each other"),
    "off center": (lambda image, seed: np.roll(image, 30, 1), "not centered on the face"),
    "beyond": (lambda image, seed: np.pad(image[30:], ((30, 0), (0, 0), (0, 0))), "beyond the"),
    "as taken": (
        lambda image, seed: np.pad(image[::2, ::2], ((10, 46), (28, 28), (0, 0)), "edge"),
        "partialfc align",
    ),
    "size": (lambda image, seed: image[::2, ::2], "100.0% of the images are not 112 x 112"),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_hints_on_channels_and_crops(kind, tmp_path):
    change, hint = LOOKS[kind]
    look = Look()
    for seed in range(40):
        look.add(np.ascontiguousarray(change(face(seed), seed)))
    hints = " ".join(look.hints())
    assert hint in hints if hint else not hints
    look.save_mean(tmp_path / "mean.png")
    assert Image.open(tmp_path / "mean.png").width == (168 if kind == "size" else 336)


def test_the_hash_is_kept_and_made_again_for_a_changed_file(tmp_path):
    path = damaged(tmp_path, lambda data, pack: None)
    found = []
    for _ in range(2):
        assert run(path, "--level", "hash", "--json", tmp_path / "r") == 0
        found.append(json.loads((tmp_path / "r").read_text())["levels"]["hash"])
    assert [entry["cached"] for entry in found] == [False, True]
    assert found[0]["sha256"] == found[1]["sha256"]
    (kept,) = [p for p in index_cache.cache_places(path, "sha256") if p.exists()]
    assert kept.parent == tmp_path
    truncated_jpeg(data := bytearray(path.read_bytes()), open_pack(path))
    path.write_bytes(data)
    run(path, "--level", "hash", "--json", tmp_path / "r")
    again = json.loads((tmp_path / "r").read_text())["levels"]["hash"]
    assert not again["cached"]
    assert again["sha256"] != found[0]["sha256"]


def test_a_folder_of_photos_is_checked_as_it_is_trained_on(tmp_path, capsys):
    """Every bad file is named and listed, so that a run leaves it out; the rest is counted."""
    folder = tmp_path / "photos"
    for person in ("ann", "bob"):
        (folder / person).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((112, 112, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{number}.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (3200, 2400)).save(folder / "ann" / "0.jpg", exif=turned)
    (folder / "ann" / "empty.jpg").write_bytes(b"")
    (folder / "bob" / "really.png").write_bytes(b"GIF89a")
    (folder / "bob" / "a.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 files and folders below the identities are no images"):
        assert run(folder, "--bad", tmp_path / "bad", "--json", tmp_path / "r") == 1
    report = json.loads((tmp_path / "r").read_text())
    assert list(report["levels"]) == ["labels", "images"]
    assert report["levels"]["images"]["decoded"] == 6
    assert report["levels"]["images"]["sizes"] == {"112 x 112": 3, "2400 x 3200": 1}
    lines = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["ann/empty.jpg", "bob/really.png"]
    assert "GIF images are not read" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no images"):
        assert len(open_dataset([folder], [tmp_path / "bad"])) == 4
    with pytest.warns(UserWarning, match="no images"):
        assert main(["validate", str(folder), "--level", "hash"]) == 2
    assert "has labels and images only" in capsys.readouterr().err
