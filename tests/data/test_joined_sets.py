"""Several sets of images: the parts of a batch, epochs of each, and identities that are one."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partialfc.config import Config, ConfigError
from partialfc.config.conflicts import may_share
from partialfc.config.heads import each_head
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.identity_map import write_identity_map
from partialfc.data.loaders.stream import Stream
from partialfc.data.names import names_of
from partialfc.data.packs.writer import PackWriter
from partialfc.data.parts import parts_of_batch
from partialfc.data.skip_list import write_skip_list
from partialfc.training.images import numberings, open_images, order_of, sets_of_identities
from tests.support.images import encoded, face

KINDS = {
    "shuffled": {},
    "padded": {"last_batch": "pad"},
    "P x K": {"images_per_identity": 3},
    "blocks": {"block": 8, "block_window": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three packs of 70, 24 and 33 images of 14, 6 and 11 identities."""
    folder = tmp_path_factory.mktemp("sets")
    for start, (name, identities, images) in enumerate([("a", 14, 5), ("b", 6, 4), ("c", 11, 3)]):
        with PackWriter(folder / f"{name}.rec") as writer:
            for number in range(identities * images):
                identity = number // images
                jpeg = encoded(face(100 * start + identity, number, 32))
                writer.write(number, identity, jpeg)
        (folder / f"{name}.identities.json").write_text(
            str([f"{name}{number}" for number in range(identities)]).replace("'", '"')
        )
    return folder


def config(folder, images=(15, 3, 6), *, maps=None, unknown="", heads=None, **data) -> Config:
    sets = {
        name: {
            "train": folder / f"{name}.rec",
            "images": count,
            "map": (maps or {}).get(name, ()),
            "same_people": "unknown" if name in unknown else "none",
        }
        for name, count in zip("abc", images, strict=False)
    }
    data = {"global_batch": sum(images), "sets": sets, **data}
    heads = {"heads": heads} if heads else {}
    return Config.model_validate({"data": data, "run": {"seed": 5}, **heads})


def stream(settings: Config, rank=0, world_size=1) -> Stream:
    dataset = open_images(settings)
    return Stream(
        dataset=dataset,
        order=order_of(settings, dataset),
        augmentation=Augmentation(shift=3, crop=0.5),
        image_size=32,
        rank=rank,
        world_size=world_size,
    )


def integers(one: Stream, samples_seen: int) -> np.ndarray:
    found = one.batch(samples_seen)
    draws = (found.draw.flip_B, found.draw.shift_x_B, found.draw.shift_y_B)
    return np.stack([found.sample_id_B, found.identity_B, *draws], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "uneven"), [(4, 0), (5, 1)])
def test_any_number_of_ranks_and_any_resume_make_the_same_batches(made, kind, world_size, uneven):
    """Also where the batch does not divide by the ranks."""
    settings = config(made, uneven=bool(uneven), **KINDS[kind])
    alone = stream(settings)
    ranks = [replace(alone, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (1, 8, 23):
        whole = integers(alone, 24 * step)
        slices = [integers(one, 24 * step) for one in ranks]
        np.testing.assert_array_equal(np.concatenate(slices), whole)
    np.testing.assert_array_equal(integers(stream(settings), 24 * step + 23), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_has_the_parts_of_the_sets_where_the_pure_function_says(made, kind):
    """A head finds its rows by it, without asking."""
    settings = config(made, **KINDS[kind])
    opened = stream(settings)
    part_B = parts_of_batch((15, 3, 6), settings.data.images_per_identity or 1)
    bounds = [part.samples for part in opened.dataset.parts]
    assert [(one.start, one.stop) for one in bounds] == [(0, 70), (70, 94), (94, 127)]
    for step in range(30):
        samples = opened.order.sample_ids(24 * step)
        for number, bound in enumerate(bounds):
            inside = (samples >= bound.start) & (samples < bound.stop)
            np.testing.assert_array_equal(inside, part_B == number)


def test_each_set_sees_its_images_once_in_an_epoch_of_its_own(made):
    """Epochs of 4, 8 and 5 steps, each without the images that fill no batch."""
    order = stream(config(made)).order
    assert [one.steps_per_epoch for one in order.orders] == [4, 8, 5]
    assert order.steps_per_epoch == 4  # of the first
    batches = [order.sample_ids(24 * step) for step in range(40)]
    part_B = parts_of_batch((15, 3, 6))
    shown = set()
    for number, steps in enumerate((4, 8, 5)):
        for start in range(0, 40, steps):
            epoch = [ids[part_B == number] for ids in batches[start : start + steps]]
            ids = np.concatenate(epoch).tolist()
            assert len(set(ids)) == len(ids), "an image comes twice"
            shown.add(tuple(ids))
    assert len(shown) == 10 + 5 + 8, "an epoch repeats the order of another"


def test_p_by_k_keeps_the_images_of_an_identity_together(made):
    settings = config(made, images_per_identity=3)
    opened = stream(settings)
    for step in range(9):
        groups = opened.batch(24 * step).identity_B.reshape(-1, 3)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == 8


def test_a_bad_image_is_replaced_by_one_of_its_own_set(made):
    """Else a batch would have another composition, and a head rows that are none of its own."""
    opened = stream(config(made))
    before = opened.batch(0).sample_id_B
    place = int(np.flatnonzero(parts_of_batch((15, 3, 6)) == 1)[1])
    opened.cannot_decode(int(before[place]), "bad")
    after = opened.batch(0).sample_id_B
    assert np.flatnonzero(before != after).tolist() == [place]
    own = before[parts_of_batch((15, 3, 6)) == 1].tolist()
    assert after[place] == own[2], "the next one of its set's order"


def test_one_set_is_data_train_to_the_bit(made):
    """The section is another way to write it."""
    settings = config(made, (24,))
    data = {"train": made / "a.rec", "global_batch": 24}
    plain = stream(Config.model_validate({"data": data, "run": {"seed": 5}}))
    assert plain.dataset.fingerprint == stream(settings).dataset.fingerprint
    one = stream(settings)
    for step in range(5):
        np.testing.assert_array_equal(integers(one, 24 * step), integers(plain, 24 * step))


def test_a_map_makes_two_identities_one(made, tmp_path):
    """c3 is b2 and a7, c0 is a13, b1 and b2 are a7; what is left moves up."""
    a, b, c = (open_dataset([made / f"{name}.rec"]) for name in "abc")
    write_identity_map(tmp_path / "b", [(2, 7), (1, 7)], of=b, onto=a)
    write_identity_map(tmp_path / "ca", [(0, 13)], of=c, onto=a)
    write_identity_map(tmp_path / "cb", [(3, 2)], of=c, onto=b)
    maps = {"b": [tmp_path / "b"], "c": [tmp_path / "ca", tmp_path / "cb"]}
    plain, mapped = (open_images(config(made, maps=one)) for one in ({}, maps))
    assert (plain.num_identities, mapped.num_identities) == (31, 27)
    assert [(p.identities.start, p.identities.stop) for p in mapped.parts] == [
        (0, 14),
        (14, 18),
        (18, 27),
    ]
    b_now = [14, 7, 7, 15, 16, 17]
    c_now = [13, 18, 19, 7, 20, 21, 22, 23, 24, 25, 26]
    number = np.array([*range(14), *b_now, *c_now])
    np.testing.assert_array_equal(mapped.labels(), number[plain.labels()])
    samples = np.arange(len(plain))
    np.testing.assert_array_equal(mapped.identities(samples), mapped.labels())
    assert [found[0] for found in mapped.records(samples)] == mapped.labels().tolist()
    assert names_of(plain) == [
        f"{s}{n}" for s, count in (("a", 14), ("b", 6), ("c", 11)) for n in range(count)
    ]
    assert names_of(mapped)[13:20] == ["a13", "b0", "b3", "b4", "b5", "c1", "c2"]
    assert plain.fingerprint == mapped.fingerprint
    assert plain.labels_fingerprint != mapped.labels_fingerprint


def test_a_map_onto_a_set_of_another_head_is_refused(made, tmp_path):
    """Its people had no number in their head, and a step failed without the cause."""
    a, c = (open_dataset([made / f"{name}.rec"]) for name in "ac")
    write_identity_map(tmp_path / "ca", [(0, 13)], of=c, onto=a)
    maps = {"c": [tmp_path / "ca"]}
    apart = config(made, maps=maps, heads={"x": {"sets": ["a"]}, "y": {"sets": ["b", "c"]}})
    with pytest.raises(ConfigError, match=r"sets.c.map: it gives 1 identities .* heads.y does not"):
        numberings(apart, open_images(apart))
    together = config(made, maps=maps, heads={"x": {"sets": ["a", "c"]}, "y": {"sets": ["b"]}})
    assert numberings(together, open_images(together)).keys() == {"x", "y"}


def test_sets_of_another_head_are_no_matter_to_one():
    """Fused kernels and label smoothing were refused to a head of one set."""
    heads = {
        "x": {"sets": ["a", "b"]},
        "y": {"sets": ["c"], "margin": {"name": "arcface", "label_smoothing": 0.1}},
    }
    both = config(Path(), unknown="b", heads=heads)
    assert {name: may_share(one) for name, one in each_head(both).items()} == {
        "x": True,
        "y": False,
    }
    heads["x"]["margin"] = heads["y"].pop("margin")
    with pytest.raises(ValueError, match=r"heads.x.margin.label_smoothing"):
        config(Path(), unknown="b", heads=heads)


def test_the_head_is_told_which_sets_may_have_the_same_people(made, tmp_path):
    """In the numbers that identities have after the maps."""
    b, a = (open_dataset([made / f"{name}.rec"]) for name in "ba")
    write_identity_map(tmp_path / "b", [(2, 7), (1, 7)], of=b, onto=a)
    settings = config(made, maps={"b": [tmp_path / "b"]})
    assert sets_of_identities(settings, open_images(settings)) is None
    settings = config(made, maps={"b": [tmp_path / "b"]}, unknown="b")
    found = sets_of_identities(settings, open_images(settings))
    assert found.sizes == (14, 4, 11)
    assert found.pairs == ((0, 1), (1, 2))


def test_sets_are_other_data_than_one_set_of_the_same_packs(made):
    """A run could go on with another composition, and nobody would see it."""
    joined = open_dataset([made / f"{name}.rec" for name in "abc"])
    sets = open_images(config(made))
    assert joined.fingerprint != sets.fingerprint
    assert joined.labels().tolist() == sets.labels().tolist()


def test_a_list_of_a_run_leaves_out_images_of_any_set(made, tmp_path):
    """It names images of all sets, as training writes it; a set's own list those of the set."""
    plain = open_images(config(made))
    for path, samples in ((tmp_path / "run", [3, 70, 126]), (tmp_path / "own", [71])):
        write_skip_list(path, [plain.bad(sample, "bad") for sample in samples])
    settings = config(made, skip=[tmp_path / "run"])
    assert [len(part.samples) for part in open_images(settings).parts] == [69, 23, 32]
    sets = settings.model_dump()["data"]["sets"]
    sets["b"]["skip"] = [tmp_path / "own"]
    found = open_images(config(made, skip=[tmp_path / "run"], sets=sets))
    assert [len(part.samples) for part in found.parts] == [69, 22, 32]
    left = np.delete(plain.labels(), [3, 70, 71, 126])
    np.testing.assert_array_equal(found.labels(), left)
    sets["b"]["skip"] = [tmp_path / "run"]
    with pytest.raises(ConfigError, match=r"data\.sets\.b\.train: .* of none of the packs"):
        open_images(config(made, sets=sets))


@pytest.mark.parametrize(
    ("of", "onto", "pairs", "words"),
    [
        ("a", "a", [(0, 0)], r"data\.sets\.b\.map: .*of other images than this set"),
        ("b", "c", [(0, 0)], r"second column is of no set above this one .*: a\."),
        ("b", "a", [(6, 0)], r"identity 6 must be in \[0, 6\)"),
        ("b", "a", [(0, 14)], r"identity 14 must be in \[0, 14\)"),
    ],
)
def test_a_map_of_other_sets_is_refused(made, tmp_path, of, onto, pairs, words):
    """It would give people the class centers of others."""
    opened = {name: open_dataset([made / f"{name}.rec"]) for name in "abc"}
    write_identity_map(tmp_path / "map", pairs, of=opened[of], onto=opened[onto])
    with pytest.raises(ConfigError, match=words):
        open_images(config(made, maps={"b": [tmp_path / "map"]}))


def test_a_map_onto_a_set_with_labels_of_its_own_is_refused(made, tmp_path):
    """It is of the identities of packs, and the labels number other ones."""
    a, b = (open_dataset([made / f"{name}.rec"]) for name in "ab")
    write_identity_map(tmp_path / "map", [(0, 0)], of=b, onto=a)
    np.save(tmp_path / "labels.npy", np.arange(len(a)) % 20)
    settings = config(made, maps={"b": [tmp_path / "map"]})
    sets = settings.model_dump()["data"]["sets"]
    sets["a"]["labels"] = tmp_path / "labels.npy"
    with pytest.raises(ConfigError, match=r"sets\.b\.map: .* with the identities of its packs: a"):
        open_images(config(made, sets=sets))


def test_maps_that_disagree_are_refused(made, tmp_path):
    a, _, c = (open_dataset([made / f"{name}.rec"]) for name in "abc")
    write_identity_map(tmp_path / "one", [(3, 1), (4, 2)], of=c, onto=a)
    write_identity_map(tmp_path / "two", [(3, 1), (4, 5)], of=c, onto=a)
    with pytest.raises(ConfigError, match="identity 4 is one person by this map and another"):
        open_images(config(made, maps={"c": [tmp_path / "one", tmp_path / "two"]}))


@pytest.mark.parametrize(
    ("images", "data", "words"),
    [
        ((15, 30, 6), {}, r"data\.sets\.b, 30 images of a batch: .* at most the 24 images"),
        ((15, 21, 6), {"images_per_identity": 3}, r"data\.sets\.b, 21 .* must be at most 18"),
    ],
)
def test_a_part_that_a_set_cannot_fill_is_refused(made, images, data, words):
    settings = config(made, images, **data)
    with pytest.raises(ConfigError, match=words):
        order_of(settings, open_images(settings))


def test_a_set_that_cannot_be_opened_is_named(made, tmp_path):
    for ending in ("rec", "idx"):
        shutil.copy(made / f"a.{ending}", tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sets\.b\.train: .*b\.rec"):
        open_images(config(tmp_path))
