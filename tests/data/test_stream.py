"""The stream before decoding: samples, flips, shifts and crops are integers, equal everywhere."""

import numpy as np
import pytest

from partialfc.data.arrangements import arrangement
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "records"
ARRANGEMENTS = {
    "shuffled": {},
    "P x K": {"images_per_identity": 3},
    "blocks": {"block": 8, "block_window": 2},
}


def stream(kind, rank=0, world_size=1, batch=12) -> Stream:
    dataset = open_dataset([GOLDEN / "insightface.rec", GOLDEN / "plain.rec"])
    arranged = arrangement(dataset, **ARRANGEMENTS[kind])
    return Stream(
        dataset=dataset,
        order=Order(len(dataset), batch, 5, "pad", arranged),
        augmentation=Augmentation(shift=3, crop=0.5),
        image_size=112,
        rank=rank,
        world_size=world_size,
    )


def integers(kind, samples_seen, rank=0, world_size=1) -> np.ndarray:
    """Of each image: sample, identity, flip, shift, and the box of its crop; a new stream."""
    encoded = stream(kind, rank, world_size).batch(samples_seen)
    crop = encoded.draw.changes["crop"]
    columns = [
        encoded.sample_id_B,
        encoded.identity_B,
        encoded.draw.flip_B,
        encoded.draw.shift_x_B,
        encoded.draw.shift_y_B,
        *np.where(crop.chosen_B[:, None], crop.value_Bn, -1).T,
    ]
    return np.stack([column.astype(np.int64) for column in columns], 1)


@pytest.mark.parametrize("kind", ARRANGEMENTS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_makes_the_same_choices(kind, world_size):
    """Over two epochs, with the images that pad the last batch."""
    assert stream(kind).order.steps_per_epoch in (6, 10)
    for step in range(20):
        ranks = [integers(kind, 12 * step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(ranks), integers(kind, 12 * step))


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_a_resume_at_any_sample_makes_the_same_choices(kind):
    """A position inside a batch is rounded down to its beginning: seen twice, never left out."""
    going = stream(kind)
    whole = [going.batch(12 * step).sample_id_B for step in range(20)]
    for samples_seen in range(240):
        ids = stream(kind).order.sample_ids(samples_seen)
        np.testing.assert_array_equal(ids, whole[samples_seen // 12])
    for step in (0, 7, 19):
        before = integers(kind, 12 * step)
        np.testing.assert_array_equal(integers(kind, 12 * step + 11), before)


def test_an_image_that_is_repeated_in_a_batch_is_not_changed_alike():
    """P x K shows few images again: four equal copies would teach nothing."""
    dataset = open_dataset([GOLDEN / "insightface.rec"])
    arranged = arrangement(dataset, images_per_identity=10)  # identities have five images
    repeated = Stream(
        dataset=dataset,
        order=Order(60, 20, 5, arrangement=arranged),
        augmentation=Augmentation(shift=8),
        image_size=112,
    ).batch(0)
    shifts = np.stack([repeated.draw.shift_x_B, repeated.draw.shift_y_B], 1).reshape(2, 2, 5, 2)
    ids = repeated.sample_id_B.reshape(2, 2, 5)
    np.testing.assert_array_equal(ids[:, 0], ids[:, 1])
    assert (shifts[:, 0] != shifts[:, 1]).any(-1).mean() > 0.8
