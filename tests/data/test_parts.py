"""How the sets are spread over a batch: exact counts, and a bound on every stretch of it."""

import numpy as np
import pytest

from partialfc.data.parts import parts_of_batch


@pytest.mark.parametrize(
    "images",
    [(1,), (8,), (1, 1), (358, 154), (461, 51), (10, 1, 1), (7, 7, 7, 7), (97, 3, 50, 2, 8)],
)
def test_every_stretch_of_a_batch_has_the_share_of_each_set(images):
    """A rank's slice would have too many of a set, or none of it."""
    part_B, sets = parts_of_batch(images), len(images)
    assert part_B.dtype == np.int64
    assert tuple(np.bincount(part_B, minlength=sets)) == images
    before = np.zeros((len(part_B) + 1, sets))
    before[1:] = np.cumsum(np.eye(sets)[part_B], 0)
    ahead = before - np.arange(len(before))[:, None] * np.array(images) / len(part_B)
    bound = 2 - 1 / (sets - 1) if sets > 1 else 0
    assert np.abs(ahead).max() <= bound / 2 + 1e-9
    assert (ahead.max(0) - ahead.min(0)).max() <= bound + 1e-9


def test_what_comes_together_stays_together():
    """K images of one identity would lie on two ranks."""
    part_B = parts_of_batch((12, 20), together=4)
    assert (part_B.reshape(-1, 4) == part_B[::4, None]).all()
    np.testing.assert_array_equal(part_B[::4], parts_of_batch((3, 5)))
    with pytest.raises(ValueError, match="read-only"):
        part_B[0] = 1
