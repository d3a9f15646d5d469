"""make faces on rendered photos that lie as LFW's do: from photos to figures."""

import json

import numpy as np
import pytest
from PIL import Image

from partialfc.alignment.mtcnn import open_mtcnn
from partialfc.data.images.jpeg import encode
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.pairs import write_pairs
from tests.support.photos import photo
from tests.support.places import ROOT
from tests.support.processes import python
from tools import faces
from tools._faces.packs import render
from tools._lfw.baselines import COMPONENTS, baselines, pixels, whitened_pca


def test_whitened_components_have_unit_spread_and_no_covariance():
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (600, 16, 16, 3), np.uint8)
    rows = whitened_pca(pixels(seen))(seen)
    assert rows.shape == (600, COMPONENTS)
    np.testing.assert_allclose(np.cov(rows.T, bias=True), np.eye(COMPONENTS), atol=1e-6)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-9)


def test_each_baseline_is_measured_on_each_set(tmp_path):
    """Pairs of one image twice and of two people: whatever looks at the images is always right."""
    images = [encode(i) for i in render(np.arange(20), np.zeros(20, np.int64), seed=1, size=32)]
    write_insightface_pack(tmp_path / "train.rec", list(enumerate(images)), 20)
    pairs = [i for n in range(10) for i in (images[n], images[n], images[n], images[n + 10])]
    write_pairs(tmp_path / "a.bin", pairs, [True, False] * 10)
    words = {"backbone": "convnet_s", "embedding_dim": 16, "size": 32, "seed": 1}
    found = baselines(tmp_path / "train.rec", [tmp_path / "a.bin"], **words)
    assert found.keys() == {"untrained", "pixels", "whitened PCA"}
    assert all(accuracy == {"a": 1.0} for accuracy in found.values())


def test_the_folder_of_photos_is_found_or_asked_for(tmp_path):
    (tmp_path / faces.PEOPLE).write_text("1\nAnn_Bee\t1\n")
    with pytest.raises(ValueError, match="no folder in it has a folder Ann_Bee"):
        faces.photos_of(tmp_path)
    (tmp_path / "lfw-deepfunneled" / "Ann_Bee").mkdir(parents=True)
    assert faces.photos_of(tmp_path) == tmp_path / "lfw-deepfunneled"
    with pytest.raises(ValueError, match=r"pairsDevTest\.txt is not there: it must be LFW's"):
        faces.prepare(tmp_path, None)


def test_bf16_is_for_a_cpu_that_multiplies_in_it(monkeypatch):
    """Others imitate it, several times slower than fp32."""
    for has, words in (({"avx512_bf16": True}, ["precision.compute=bf16"]), ({"avx2": True}, [])):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda has=has: has, raising=False)
        assert faces._formats() == words


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_chain(tmp_path):
    """Six people to train on, and ten pairs of each kind of others, found by MTCNN."""
    detector, people = open_mtcnn(), []
    for person in range(60):
        both = [photo(person, image)[0] for image in range(2)]
        if len(people) < 26 and all(len(detector(pixels)) for pixels in both):
            people.append((f"P_{person}", both))
    assert len(people) == 26
    for name, both in people:
        (tmp_path / "lfw" / name).mkdir(parents=True)
        for number, pixels_ in enumerate(both, 1):
            Image.fromarray(pixels_).save(tmp_path / "lfw" / name / f"{name}_000{number}.jpg")
    trained, tested = ([name for name, _ in part] for part in (people[:6], people[6:]))
    text = "\n".join(["6", *(f"{name}\t2" for name in trained)])
    (tmp_path / faces.PEOPLE).write_text(f"{text}\n")
    same = [f"{name}\t1\t2" for name in tested[:10]]
    other = [f"{a}\t1\t{b}\t1" for a, b in zip(tested[:10], tested[10:], strict=True)]
    in_turn = [line for both in zip(same, other, strict=True) for line in both]
    (tmp_path / "pairs.txt").write_text("\n".join(["10\t1", *in_turn]) + "\n")
    (tmp_path / "pairsDevTest.txt").write_text("\n".join(["10", *in_turn]) + "\n")
    words = ["run.epochs=2", "backbone.name=convnet_s", "data.global_batch=4", "data.image_size=32"]
    words += ["schedule.warmup_steps=1", "data.loader=torch", "data.augment.colour=0"]
    words += ["data.augment.grey=0", "data.augment.cutout=0", f"run.folder={tmp_path / 'run'}"]
    words += [f"data.train={tmp_path / 'packs' / 'train.rec'}"]
    words += [f"verification.pairs=['{tmp_path / 'packs' / 'dev_test.bin'}']"]
    code = (
        "import sys\nfrom pathlib import Path\nfrom tools import faces\n"
        "faces.PACKS = Path(sys.argv[1])\nsys.exit(faces.main(sys.argv[2:]))"
    )
    done = python("-c", code, tmp_path / "packs", tmp_path, *words, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "faces.json").read_text())["accuracy"]
    assert found.keys() == {"untrained", "pixels", "whitened PCA", "partialfc, arcface"}
    assert all(accuracy.keys() == {"dev_test", "ten_folds"} for accuracy in found.values())
