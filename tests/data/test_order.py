"""Which images are in which batch: the same on any number of ranks, resumed from one integer."""

import numpy as np
import pytest

from partialfc.data.order import Order


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    start = epoch * order.steps_per_epoch
    steps = range(start, start + order.steps_per_epoch)
    return np.concatenate([order.sample_ids(step * order.global_batch) for step in steps])


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_ranks_share_the_global_batch_in_rank_order(world_size, last_batch):
    order = Order(101, 12, seed=7, last_batch=last_batch)
    for samples_seen in range(0, 40 * 12, 12):
        slices = [order.sample_ids(samples_seen, rank, world_size) for rank in range(world_size)]
        assert {len(ids) for ids in slices} == {12 // world_size}
        np.testing.assert_array_equal(np.concatenate(slices), order.sample_ids(samples_seen))


@pytest.mark.parametrize("num_samples", [12, 96, 101, 107])
def test_drop_sees_every_image_at_most_once(num_samples):
    order = Order(num_samples, 12, seed=7)
    assert order.steps_per_epoch == num_samples // 12
    for epoch in range(3):
        ids = epoch_ids(order, epoch)
        assert len(set(ids.tolist())) == len(ids) == num_samples // 12 * 12
        assert ids.min() >= 0
        assert ids.max() < num_samples


def test_the_images_that_drop_leaves_out_differ_by_epoch():
    """Else the last images of a pack would never be trained on."""
    order = Order(101, 12, seed=7)
    left_out = [frozenset(set(range(101)) - set(epoch_ids(order, epoch))) for epoch in range(40)]
    assert all(len(images) == 5 for images in left_out)
    assert len(set(left_out)) == 40
    assert len(frozenset.union(*left_out)) > 70  # 87 expected of 101


@pytest.mark.parametrize(
    ("num_samples", "batch"), [(96, 12), (101, 12), (107, 12), (5, 12), (1, 3)]
)
def test_pad_sees_every_image_and_fills_up_with_the_first_of_the_epoch(num_samples, batch):
    order = Order(num_samples, batch, seed=7, last_batch="pad")
    assert order.steps_per_epoch == -(-num_samples // batch)
    for epoch in range(3):
        ids = epoch_ids(order, epoch)
        assert sorted(ids[:num_samples]) == list(range(num_samples))
        np.testing.assert_array_equal(ids, np.resize(ids[:num_samples], len(ids)))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_ids(Order(96, 12, seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({ids.tobytes() for ids in orders}) == 16
    same_place = [np.mean(a == b) for a in orders for b in orders if a is not b]
    assert np.mean(same_place) < 0.03  # 1/96 expected: no cyclic order


def test_epoch_counts_its_own_steps():
    assert [Order(101, 12, 7).epoch(n) for n in (0, 95, 96, 191, 192)] == [0, 0, 1, 1, 2]
    assert [Order(101, 12, 7, "pad").epoch(n) for n in (0, 107, 108, 216)] == [0, 0, 1, 2]


def test_another_global_batch_goes_on_from_the_same_image_of_the_first_epoch():
    """Rounded down to a whole batch of the new size, so that no image is left out."""
    order = Order(1000, 12, seed=7)
    other = Order(1000, 50, seed=7)
    everything = epoch_ids(order, 0)
    np.testing.assert_array_equal(other.sample_ids(300), everything[300:350])
    np.testing.assert_array_equal(other.sample_ids(312), everything[300:350])


def test_the_order_of_a_seed_is_the_same_in_every_version():
    """A run that is resumed after an upgrade must go on with the images it has not seen."""
    assert Order(10, 4, seed=1).sample_ids(0).tolist() == [9, 7, 3, 0]
    assert Order(10, 4, seed=1).sample_ids(8).tolist() == [7, 6, 9, 3]
    assert Order(10, 4, seed=1, last_batch="pad").sample_ids(8).tolist() == [4, 5, 9, 7]
    large = Order(10**9, 4, seed=1).sample_ids(8).tolist()
    assert large == [610800965, 3532188, 585903123, 954714723]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1), "num_samples must be >= 1, got 0"),
        ((10, 0, 1), "data.global_batch must be >= 1, got 0"),
        ((10, 4, 1, "keep"), 'data.last_batch must be "drop" or "pad", got \'keep\''),
        ((10, 11, 1), 'data.global_batch must be at most the 10 images of an epoch, got 11.*"pad"'),
    ],
)
def test_impossible_orders_are_refused_by_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "samples_seen must be >= 0, got -1"),
        ((0, 0, 5), "data.global_batch must be a multiple of the 5 ranks, got 12: .* 10 or 15"),
        ((0, 0, 24), "data.global_batch must be a multiple of the 24 ranks, got 12: .* is 24"),
        ((0, 4, 4), r"rank must be in \[0, 4\), the world size, got 4"),
        ((0, -1, 4), r"rank must be in \[0, 4\), the world size, got -1"),
    ],
)
def test_impossible_batches_are_refused_by_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(101, 12, seed=7).sample_ids(*arguments)
