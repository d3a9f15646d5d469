import numpy as np
import pytest

from partialfc.data.images.jpeg import decode
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.pairs import read_pairs
from tools._faces.packs import draw_pairs, render, write_demo_packs

SMALL = {
    "identities": 6,
    "images_per_identity": 5,
    "verification_identities": 4,
    "pairs": 40,
    "probes": 3,
    "seed": 3,
}


def test_an_image_depends_on_nothing_but_its_ids_and_the_seed():
    identities, images = np.array([5, 1, 5]), np.array([2, 0, 7])
    together = render(identities, images, seed=1, size=48)
    for row in range(3):
        alone = render(identities[row : row + 1], images[row : row + 1], seed=1, size=48)
        assert np.array_equal(alone[0], together[row])
    assert not np.array_equal(render(identities, images, seed=2, size=48), together)


def test_every_image_is_an_image():
    """No pose or light may leave a blank or a torn picture (a NaN became noise once)."""
    identities = np.arange(60)
    with np.errstate(all="raise", under="ignore"):
        images = render(identities, identities, seed=1, size=64)
    spread = images.reshape(60, -1).std(axis=1)
    assert (spread > 12).all()


def test_light_and_background_do_not_tell_identities_apart():
    """Mean colours must be useless: a network has to look at the face."""
    count, shots = 40, 6
    identities = np.repeat(np.arange(count), shots)
    images = render(identities, np.tile(np.arange(shots), count), seed=1, size=32)
    colour = images.reshape(count, shots, -1, 3).mean(axis=2)
    between = colour.mean(axis=1).var(axis=0).mean()
    within = colour.var(axis=1).mean()
    assert within > 2 * between


def test_an_identity_is_the_same_face_in_another_shot():
    """With the nuisance averaged away, two halves of an identity's images are nearest."""
    count, shots = 30, 24
    identities = np.repeat(np.arange(count), shots)
    images = render(identities, np.tile(np.arange(shots), count), seed=1, size=32)
    grey = images.mean(axis=3).reshape(count, shots, -1)
    grey = (grey - grey.mean(axis=2, keepdims=True)) / grey.std(axis=2, keepdims=True)
    one, other = grey[:, ::2].mean(axis=1), grey[:, 1::2].mean(axis=1)
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    nearest = (one @ other.T / np.linalg.norm(other, axis=1)).argmax(axis=1)
    assert (nearest == np.arange(count)).mean() > 0.6


def test_packs_do_not_depend_on_the_workers_and_hold_other_identities(tmp_path):
    for workers in (1, 2):
        write_demo_packs(tmp_path / str(workers), workers=workers, **SMALL)
    for name in ("train.rec", "train.idx", "heldout.rec", "heldout.idx", "verification.bin"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    pack = open_pack(tmp_path / "1" / "train.rec")
    assert (len(pack), pack.num_identities) == (30, 6)
    assert pack.identities(np.arange(30)).tolist() == np.repeat(np.arange(6), 5).tolist()
    pixels = decode(pack.jpeg_view(7))
    truth = render(np.array([1]), np.array([2]), seed=3)[0]
    assert np.abs(pixels.astype(int) - truth).mean() < 8
    others = open_pack(tmp_path / "1" / "heldout.rec")
    assert others.identities(np.arange(len(others))).tolist() == np.repeat(np.arange(4), 3).tolist()
    truth = render(np.array([6 + 2]), np.array([1]), seed=3)[0]
    assert np.abs(decode(others.jpeg_view(7)).astype(int) - truth).mean() < 8
    pairs = read_pairs(tmp_path / "1" / "verification.bin")
    assert len(pairs.images) == 80
    identities, _, same = draw_pairs(6, 4, 40, seed=3)
    assert set(identities.tolist()) == {6, 7, 8, 9}
    assert pairs.same.tolist() == same


def test_finished_packs_are_kept_and_others_replaced(tmp_path):
    write_demo_packs(tmp_path, workers=1, **SMALL)
    before = (tmp_path / "train.rec").stat().st_mtime_ns
    write_demo_packs(tmp_path, workers=1, **SMALL)
    assert (tmp_path / "train.rec").stat().st_mtime_ns == before
    write_demo_packs(tmp_path, workers=1, **{**SMALL, "seed": 4})
    assert (tmp_path / "train.rec").stat().st_mtime_ns > before


def test_every_fold_of_the_pairs_is_balanced_and_no_image_is_used_twice():
    identities, images, same = draw_pairs(100, 30, 200, seed=1)
    assert (np.array(same).reshape(10, 20).sum(axis=1) == 10).all()
    assert ((identities[0::2] == identities[1::2]) == same).all()
    assert len(set(zip(identities.tolist(), images.tolist(), strict=True))) == 400


def test_unbalanced_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of 20"):
        write_demo_packs(tmp_path, workers=1, **{**SMALL, "pairs": 30})
