"""Arrangements of an epoch: P x K batches and blocks, as integers the same on any ranks."""

import numpy as np
import pytest

from partialfc.data.arrangements import Blocks, IdentityBalanced, arrangement
from partialfc.data.dataset import open_dataset
from partialfc.data.order import Order
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "records" / "insightface.rec"

COUNTS = [1, 2, 3, 4, 5, 8, 11, 0, 40, 4, 4, 1, 7]
"""Images of each identity; one has none."""
IDENTITY_N = np.repeat(np.arange(len(COUNTS)), COUNTS)


def balanced(per_identity=4, batch=8, identity_N=IDENTITY_N, **options) -> Order:
    arranged = IdentityBalanced.of(identity_N, per_identity)
    return Order(len(identity_N), batch, 5, arrangement=arranged, **options)


def batches(order: Order, count: int) -> list[np.ndarray]:
    return [order.sample_ids(step * order.global_batch) for step in range(count)]


@pytest.mark.parametrize("per_identity", [1, 2, 3, 4])
def test_a_batch_is_p_identities_with_k_images_each(per_identity):
    """Else a loss that compares images finds no pair, or counts an identity twice."""
    for ids in batches(balanced(per_identity, 2 * per_identity), 60):
        groups = IDENTITY_N[ids].reshape(2, per_identity)
        assert (groups == groups[:, :1]).all()
        assert groups[0, 0] != groups[1, 0]
        for group in ids.reshape(2, per_identity):
            count = COUNTS[IDENTITY_N[group[0]]]
            assert len(set(group.tolist())) == min(per_identity, count)


def test_every_identity_comes_once_in_an_epoch():
    order = balanced(4, 8)
    assert order.epoch_size == 12 * 4
    orders = set()
    for epoch in range(5):
        ids = order.at(epoch, np.arange(order.epoch_size)).sample_id_B
        seen = IDENTITY_N[ids[::4]].tolist()
        assert sorted(seen) == [i for i, count in enumerate(COUNTS) if count]
        orders.add(tuple(seen))
    assert len(orders) == 5


def test_an_identity_goes_through_its_images_before_it_begins_again():
    """40 images four at a time are ten epochs; 11 images are two, and three others sit out."""
    order = balanced(4, 8)
    epochs = [order.at(epoch, np.arange(48)).sample_id_B for epoch in range(40)]

    def of(identity, first, count):
        shown = np.concatenate(epochs[first : first + count])
        return shown[IDENTITY_N[shown] == identity]

    first = int(np.cumsum(COUNTS)[7])
    for start in (0, 10, 20):
        assert sorted(of(8, start, 10)) == list(range(first, first + 40))
    assert of(8, 0, 10).tolist() != of(8, 10, 10).tolist()
    left_out = set()
    for start in range(0, 40, 2):
        shown = of(6, start, 2).tolist()
        assert len(set(shown)) == len(shown) == 8
        left_out |= set(np.flatnonzero(IDENTITY_N == 6)) - set(shown)
    assert len(left_out) == 11, "always the same images were left out"


def test_few_images_are_repeated_in_turn_with_another_augmentation():
    order = balanced(4, 8)
    samples = order.at(3, np.arange(48))
    for ids, repeats in zip(
        samples.sample_id_B.reshape(12, 4), samples.repeat_B.reshape(12, 4), strict=True
    ):
        count = COUNTS[IDENTITY_N[ids[0]]]
        if count < 4:
            np.testing.assert_array_equal(ids, np.resize(ids[:count], 4))
            np.testing.assert_array_equal(repeats, np.arange(4) // count)
        else:
            assert not repeats.any()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_shares_the_same_batches(world_size):
    order = balanced(3, 12)
    for step, ids in enumerate(batches(order, 30)):
        parts = [order.sample_ids(12 * step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_a_resume_at_any_sample_has_the_same_tail():
    """The state is one integer: nothing but it decides what comes next."""
    whole = batches(balanced(), 40)
    for step in range(40):
        np.testing.assert_array_equal(balanced().sample_ids(8 * step), whole[step])


def test_images_in_any_order_of_the_pack():
    """Labels of a plain pack need not be sorted."""
    mixed = np.random.default_rng(0).permutation(IDENTITY_N)
    for ids in batches(balanced(4, 8, mixed), 20):
        groups = mixed[ids].reshape(2, 4)
        assert (groups == groups[:, :1]).all()


def test_the_rest_of_an_epoch_is_dropped_or_filled_with_its_first_identities():
    drop, pad = balanced(4, 20), balanced(4, 20, last_batch="pad")
    assert (drop.steps_per_epoch, pad.steps_per_epoch) == (2, 3)
    last = pad.sample_ids(40)
    np.testing.assert_array_equal(last[8:], pad.sample_ids(0)[:12])


@pytest.mark.parametrize(
    ("per_identity", "batch", "message"),
    [
        (4, 10, r"images_per_identity = 4 must divide data.global_batch, got 10. Nearest: 8 or 12"),
        (4, 52, "at most 48 with data.images_per_identity = 4, .* 12 identities have images"),
    ],
)
def test_batches_that_cannot_be_made_are_refused_by_key(per_identity, batch, message):
    with pytest.raises(ValueError, match=message):
        balanced(per_identity, batch, last_batch="pad")


def test_it_is_what_the_setting_asks_for():
    dataset = open_dataset([GOLDEN])
    assert arrangement(dataset) is None
    order = Order(60, 12, seed=1, arrangement=arrangement(dataset, images_per_identity=3))
    identities = dataset.identities(order.sample_ids(0)).reshape(4, 3)
    assert (identities == identities[:, :1]).all()
    assert len(set(identities[:, 0])) == 4


def blocks(size=1003, block=10, window=4, batch=12) -> Order:
    return Order(size, batch, 5, arrangement=Blocks(size, block, window))


@pytest.mark.parametrize(
    ("size", "block", "window"),
    [
        (1003, 10, 4),
        (1000, 10, 4),
        (39, 10, 4),
        (40, 10, 4),
        (7, 10, 4),
        (1003, 1, 1),
        (90, 9, 100),
    ],
)
def test_blocks_put_every_image_at_one_position_of_an_epoch(size, block, window):
    order = blocks(size, block, window, batch=1)
    epochs = [order.at(epoch, np.arange(size)).sample_id_B for epoch in range(3)]
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(size))
    if size > 40:
        assert epochs[0].tolist() != epochs[1].tolist()
    some = np.random.default_rng(0).permutation(size)
    np.testing.assert_array_equal(order.at(0, some).sample_id_B, epochs[0][some])


def test_a_window_of_an_epoch_comes_from_its_blocks_only():
    """Measured: 40 positions touch 4 blocks of 10; one permutation of all touches about 33."""
    ids = blocks().at(0, np.arange(1003)).sample_id_B
    for start in range(0, 920, 40):
        assert len(set((ids[start : start + 40] // 10).tolist())) == 4
        assert (np.diff(ids[start : start + 40]) != 1).mean() > 0.7, "not shuffled within"
    shuffled = Order(1003, 12, 5).at(0, np.arange(1003)).sample_id_B
    assert len(set((shuffled[:40] // 10).tolist())) > 25


def test_blocks_are_not_where_they_are_in_the_file():
    ids = blocks().at(0, np.arange(1000)).sample_id_B
    middle = [np.median(ids[start : start + 40]) for start in range(0, 1000, 40)]
    assert abs(np.corrcoef(middle, np.arange(25))[0, 1]) < 0.5


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_shares_the_same_blocks(world_size):
    order = blocks()
    for step in range(90):
        parts = [order.sample_ids(12 * step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), blocks().sample_ids(12 * step))
