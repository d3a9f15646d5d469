"""partialfc evaluate: official layouts made small, and the same digits however it is run."""

import csv
import json
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.__main__ import main
from partialfc.alignment.crop import TEMPLATE, align, similarity
from partialfc.backbones import build_backbone
from partialfc.commands import evaluate
from partialfc.commands._evaluate.people import people_of
from partialfc.data.images.jpeg import decode
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.benchmarks import read_ijb, read_image, read_megaface
from partialfc.data.sets.pairs import read_pairs, write_pairs
from tests.support.images import face
from tests.support.places import FIXTURES
from tests.support.processes import python

DATA = FIXTURES
SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.manual_seed(0)
    backbone = build_backbone("convnet_s", embedding_dim=32, image_size=SIZE)
    torch.save(backbone.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ijb(tmp_path_factory):
    """IJB-C's files for 6 subjects: templates 1-6 in G1 or G2, 11-16 probes, a video in each."""
    folder = tmp_path_factory.mktemp("IJBC")
    (folder / "meta").mkdir()
    (folder / "loose_crop").mkdir()
    crops, members, galleries, probes = [], [], {"G1": [], "G2": []}, []
    for subject in range(1, 7):
        for base in (0, 10):
            template = base + subject
            for image in range(3):
                name = f"{len(crops) + 1}.{'png' if image else 'jpg'}"
                Image.fromarray(face(subject, 10 * base + image, 140)).save(
                    folder / "loose_crop" / name, **({} if image else {"quality": 95})
                )
                points = (TEMPLATE * 1.1 + 8).round(3).ravel()
                crops.append(f"{name} {' '.join(map(str, points))} {0.9 + image / 100:.2f}")
                members.append(f"{name} {template} {100 * template + (image > 0)}")
        galleries["G1" if subject <= 3 else "G2"].append([subject, subject, "x.jpg"])
        probes.append([10 + subject, subject, "x.jpg"])
    pairs = [f"{a} {b + 10} {int(a == b)}" for a in range(1, 7) for b in range(1, 7)]
    meta = folder / "meta"
    (meta / "ijbc_name_5pts_score.txt").write_text("\n".join(crops) + "\n")
    (meta / "ijbc_face_tid_mid.txt").write_text("\n".join(members) + "\n")
    (meta / "ijbc_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    for name, rows in (
        ("1N_gallery_G1", galleries["G1"]),
        ("1N_gallery_G2", galleries["G2"]),
        ("1N_probe_mixed", probes),
    ):
        with (meta / f"ijbc_{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["TEMPLATE_ID", "SUBJECT_ID", "FILENAME"], *rows])
    return folder


@pytest.fixture(scope="module")
def megaface(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megaface")
    lists = {"facescrub": [], "megaface": []}
    for person in range(4):
        for image in range(3):
            lists["facescrub"].append((f"P{person}/P{person}_{image}.png", face(person, image)))
    for other in range(20):
        lists["megaface"].append((f"00/{other}.jpg", face(100 + other, 0)))
    for kind, files in lists.items():
        for name, pixels in files:
            path = folder / f"{kind}_images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (folder / f"{kind}_lst").write_text("".join(f"{name}\n" for name, _ in files))
    (folder / "facescrub_noises.txt").write_text("# wrong person\nP3_2.png\n")
    (folder / "megaface_noises.txt").write_text("00/7.jpg\n")
    return folder


def run(*words, ranks=None):
    return python("-m", "partialfc", "evaluate", *words, ranks=ranks)


SETS = (
    DATA / "pairs" / "pairs_proto4.bin",
    DATA / "records" / "insightface.rec",
    f"all:{DATA / 'records' / 'labels2.rec'}",
    f"open:{DATA / 'records' / 'insightface.rec'},{DATA / 'records' / 'plain.rec'}",
)


@pytest.mark.distributed
def test_ranks_and_batch_do_not_change_a_digit(model, ijb, megaface, tmp_path):
    """Byte for byte the same JSON: images meet the same others in a block, whoever runs it."""
    results = {}
    for ranks, batch in ((None, 256), (3, 1)):
        out = tmp_path / f"{ranks}_{batch}"
        words = [model, *SETS, ijb, megaface, "--image-size", SIZE, "--out", out, "--far=0.1,0.01"]
        done = run(*words, "--batch", batch, ranks=ranks)
        assert done.returncode == 0, done.stderr
        results[ranks, batch] = (out / "results.json").read_text()
        with Image.open(out / "results.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5, "the picture is not blank"
    assert len(set(results.values())) == 1
    sets = json.loads(results[None, 256])["sets"]
    opened = "insightface against plain"
    assert set(sets) == {"pairs_proto4", "insightface", "all:labels2", opened, "ijbc", "megaface"}
    assert sets[opened]["numbers"]["num_distractors"] > 0
    assert sets["ijbc"]["protocol"] == "templates, F2 N1 D1, exact thresholds"
    assert sets["ijbc"]["numbers"]["search"]["G1"]["num_nonmated"] == 3
    assert sets["megaface"]["numbers"]["raw"]["num_searches"] == 24
    assert sets["megaface"]["numbers"]["cleaned"]["num_searches"] == 20
    assert sets["megaface"]["numbers"]["cleaned"]["num_distractors"] == 19
    assert sets["all:labels2"]["numbers"]["num_genuine"] > 0
    assert len(sets["insightface"]["cmc"]) == 50
    pairs = sets["pairs_proto4"]["numbers"]
    assert -1 <= pairs["threshold"] <= 1, "a cosine"
    assert "threshold_squared_distance" not in pairs


def test_every_mode_is_printed_beside_its_numbers(model, ijb, capsys):
    words = [str(model), str(ijb), str(SETS[0]), "--image-size", str(SIZE), "--device", "cpu"]
    modes = ["--no-flip", "--no-norms", "--no-detector", "--compat", "insightface"]
    assert evaluate.main([*words, *modes]) == 0
    shown = capsys.readouterr().out
    assert "F0 N0 D0" in shown
    assert "ten-fold verification, thresholds as insightface" in shown
    assert "val_at_far_0.001 val: " in shown
    cosine, squared = (
        float(re.search(rf"\b{name} ([0-9.]+)", shown)[1])
        for name in ("threshold", "threshold_squared_distance")
    )
    assert squared == pytest.approx(2 - 2 * cosine, abs=2e-4)
    assert "G1+G2" in shown


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing.bin", "^missing.bin: No such file or directory. .*Check the path.$"),
        ("nowhere", "nowhere: not a set: .* There is nothing of that name"),
        ("all:missing.rec", "missing.rec"),
        ("open:one.rec", "open: wants two packs"),
        (str(DATA / "pairs"), "not a set"),
    ],
)
def test_a_missing_set_is_an_error_that_names_it(model, word, message, capsys):
    assert main(["evaluate", str(model), word, "--image-size", str(SIZE)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_png_is_measured_and_a_set_of_one_kind_is_named_while_the_others_are(
    model, tmp_path, capsys
):
    """PNG of the pixels of a JPEG: a pack and a .bin of them give the same digits."""
    pairs = read_pairs(SETS[0])
    pixels = [decode(np.frombuffer(image, np.uint8)) for image in pairs.images]
    png = [png_of(image) for image in pixels]
    write_pairs(tmp_path / "png.bin", png, pairs.same)
    write_pairs(tmp_path / "one_kind.bin", [png[0]] * 24, [True] * 12)
    for name, images in (("jpeg", pairs.images), ("png", png)):
        samples = [(i // 4, image) for i, image in enumerate(images[:24])]
        write_insightface_pack(tmp_path / f"{name}_pack.rec", samples, 6)
    names = ("one_kind.bin", "png.bin", "png_pack.rec", "jpeg_pack.rec")
    words = [model, *(tmp_path / name for name in names), SETS[0], "--image-size", SIZE]
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "not measured: " in said
    assert "one_kind.bin: 12 pairs, 12 of them of one identity: ten-fold verification needs" in said
    sets = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    assert list(sets) == ["png", "png_pack", "jpeg_pack", "pairs_proto4"]
    assert sets["png"]["numbers"] == sets["pairs_proto4"]["numbers"]
    assert sets["png_pack"]["numbers"] == sets["jpeg_pack"]["numbers"]


def png_of(pixels):
    stored = BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


NAMES = ["Ada", "Bea, the second", "Cleo", "[red]Dora", "Eva", "Fay"]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Six people, three images each, as a folder, a pack with names, and lists of pairs."""
    folder = tmp_path_factory.mktemp("people")
    for person, name in enumerate(NAMES):
        (folder / "photos" / name).mkdir(parents=True)
        for image in range(3):
            pixels = face(person, image, SIZE)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{name}_000{image + 1}.jpg")
    words = ["pack", folder / "photos", folder / "people.rec", "--size", SIZE, "--workers", "1"]
    assert main([str(word) for word in words]) == 0
    same = [f"{name}\t{a}\t{b}\n" for name in NAMES for a, b in ((1, 2), (1, 3), (2, 3))]
    other = [f"{NAMES[i]}\t{j}\t{NAMES[i - 1]}\t{j}\n" for i in range(6) for j in (1, 2, 3)]
    (folder / "people.txt").write_text("18\n" + "".join(same + other))
    return folder


def test_results_are_of_people_by_name_and_a_list_stands_beside_a_pack_of_its_name(
    model, people, tmp_path, capsys
):
    """How everybody was found, and the pairs that look least like what they are."""
    listed = f"pairs:{people / 'people.txt'},{people / 'photos'}"
    assert main(["convert", "bin", str(people / "people.txt"), str(tmp_path / "people.bin"),
                 "--images", str(people / "photos")]) == 0  # fmt: skip
    words = [str(people / "people.rec"), listed, str(tmp_path / "people.bin"), "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["evaluate", str(model), *words, "--image-size", str(SIZE), "--out", str(out)]) == 0
    sets = json.loads((out / "results.json").read_text())["sets"]
    assert list(sets) == ["people.rec", "people.txt", "people.bin"]
    assert sets["people.txt"]["numbers"] == sets["people.bin"]["numbers"]
    rows = list(csv.DictReader((out / "people.csv").open(encoding="utf-8")))
    assert sorted(row["name"] for row in rows) == sorted(NAMES)
    assert all(sorted(NAMES)[int(row["identity"])] == row["name"] for row in rows)
    assert {row["probes"] for row in rows} == {"2"}
    found = sum(int(row["found"]) for row in rows)
    assert found / 12 == sets["people.rec"]["numbers"]["rate"]["1"]
    shares = [int(row["found"]) for row in rows]
    assert shares == sorted(shares), "who is found least comes first"
    assert [one["name"] for one in sets["people.rec"]["people"]] == [row["name"] for row in rows]
    pairs = list(csv.DictReader((out / "pairs.csv").open(encoding="utf-8")))
    assert len(pairs) == 36
    assert all((people / "photos" / pair["first"]).is_file() for pair in pairs)
    least = min((pair for pair in pairs if pair["same"] == "1"), key=lambda p: float(p["cosine"]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "least alike of one person" in shown
    assert least["first"].split("/")[0].split(",")[0] in shown
    if found < 12:
        assert f"{rows[0]['name']} ({rows[0]['identity']}) {rows[0]['found']} of 2" in shown


def test_who_was_taken_for_whom_is_counted():
    identity, rank = np.array([4, 4, 4, 7, 7]), np.array([1, 2, 3, 1, 1])
    people = people_of(identity, rank, np.array([4, 7, 7, 7, 7]), [f"p{i}" for i in range(8)])
    assert [(one.name, one.found, one.probes, one.taken_for_name) for one in people] == [
        ("p4", 1, 3, "p7"),
        ("p7", 2, 2, None),
    ]
    assert people[0].words == "p4 (4) 1 of 3, taken for p7 (7)"
    assert people_of(identity, rank, identity, None)[0].words == "4 1 of 3"


def test_a_set_that_is_named_twice_is_refused(model, people, capsys):
    word = str(people / "people.rec")
    assert main(["evaluate", str(model), word, word, "--image-size", str(SIZE)]) == 2
    assert "people.rec is there twice" in capsys.readouterr().err


def rewrite(path, line, text):
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        ("ijbc_face_tid_mid.txt", 3, "other.jpg 1 2", "line 3: other.jpg, and"),
        ("ijbc_face_tid_mid.txt", 2, "2.png 1", "line 2: 2 words, must be 3"),
        ("ijbc_face_tid_mid.txt", 2, "2.png 1 x", "line 2: 1 x: must be numbers"),
        ("ijbc_name_5pts_score.txt", 1, "../../etc/passwd" + " 1" * 11, "line 1: 1.jpg"),
        ("ijbc_name_5pts_score.txt", 1, "1.jpg nan" + " 1" * 10, "must be finite"),
        ("ijbc_template_pair_label.txt", 4, "1 2 7", "line 4: 7 must be 0 or 1"),
        ("ijbc_1N_probe_mixed.csv", 3, "11,5,x", "template 11 is of subject 5 here and of 1"),
    ],
)
def test_a_damaged_list_is_refused_by_file_and_line(ijb, tmp_path, file, line, text, message):
    for source in (ijb / "meta").iterdir():
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / source.name).write_bytes(source.read_bytes())
    rewrite(tmp_path / "meta" / file, line, text)
    with pytest.raises(ValueError, match=rf"{message}"):
        read_ijb(tmp_path)


def test_a_name_that_leads_outside_is_refused(megaface, tmp_path):
    for name in ("facescrub_lst", "megaface_lst", "facescrub_noises.txt", "megaface_noises.txt"):
        (tmp_path / name).write_bytes((megaface / name).read_bytes())
    rewrite(tmp_path / "facescrub_lst", 1, "../secret.png")
    with pytest.raises(ValueError, match="must be a path inside"):
        read_megaface(tmp_path)


def test_landmarks_at_their_places_change_nothing_and_a_moved_face_is_moved_back():
    pixels = face(3, 0)
    np.testing.assert_array_equal(align(pixels, TEMPLATE), pixels)
    turn = np.radians(20)
    rotation = 1.5 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    moved = TEMPLATE @ rotation.T + [70, 20]
    found = similarity(moved)
    np.testing.assert_allclose(moved @ found[:, :2].T + found[:, 2], TEMPLATE, atol=1e-9)
    # The image moved by the same transform comes back, but for two interpolations.
    found[:, 2] += 0.5 - found[:, :2] @ [0.5, 0.5]  # Pillow counts from the corner of a pixel
    smooth = np.asarray(Image.fromarray(pixels).resize((8, 8)).resize((112, 112)))
    large = Image.fromarray(smooth).transform(
        (300, 300), Image.Transform.AFFINE, tuple(found.ravel()), Image.Resampling.BILINEAR
    )
    back = align(np.asarray(large), moved)[20:92, 20:92].astype(int)
    assert np.abs(back - smooth[20:92, 20:92]).mean() < 4


def test_alignment_is_open_cvs_least_squares():
    """skimage's estimate is the same closed form; here against a search of the four numbers."""
    generator = np.random.default_rng(0)
    points = TEMPLATE * 1.3 + generator.normal(0, 4, (5, 2))
    x, y = points.T
    rows = np.concatenate(
        [
            np.stack([x, -y, np.ones(5), np.zeros(5)], 1),
            np.stack([y, x, np.zeros(5), np.ones(5)], 1),
        ]
    )
    a, b, shift_x, shift_y = np.linalg.lstsq(rows, TEMPLATE.T.ravel(), rcond=None)[0]
    np.testing.assert_allclose(similarity(points), [[a, -b, shift_x], [b, a, shift_y]], atol=1e-9)
    with pytest.raises(ValueError, match="at one point"):
        similarity(np.ones((5, 2)))


def test_a_file_that_is_no_image_is_refused_by_its_name(tmp_path):
    Image.fromarray(face(0, 0)).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(read_image(tmp_path / "a.bmp"), face(0, 0))
    (tmp_path / "b.jpg").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"b\.jpg: GIF images are not read"):
        read_image(tmp_path / "b.jpg")
