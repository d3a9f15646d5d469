"""Open-set identification against numbers worked out by hand, ties included."""

import math

import numpy as np
import pytest

from partialfc.protocols.open_set import open_set


def at(*degrees):
    """Unit vectors in the plane."""
    radians = np.radians(np.array(degrees, dtype=np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


GALLERY, IDENTITIES = at(0, 90), np.array([7, 3])


def test_a_probe_must_be_first_and_above_the_threshold():
    """Distractors score cos 30, 40, 41, 45 at best. One of four may pass: the threshold is cos 40.

    Probes: 10 degrees off (found), 35 off (found), 42 off (below), 50 off (another is nearer).
    """
    numbers = open_set(
        GALLERY,
        IDENTITIES,
        at(10, 90 - 35, 42, 50),
        np.array([7, 3, 7, 7]),
        at(30, 50, -41, 45),
        targets=(0.25, 0.5, 0.24),
    )
    assert numbers.rate_at_fpir[0.25] == pytest.approx(0.5)
    assert numbers.rate_at_fpir[0.5] == pytest.approx(0.5)  # above cos 41: the same two
    assert math.isnan(numbers.rate_at_fpir[0.24]), "one of four is more than 0.24"
    assert (numbers.num_probes, numbers.num_distractors, numbers.num_gallery) == (4, 4, 2)


def test_ties_count_against_the_probe():
    """At 45 degrees both identities score the same; at 40 the distractor does."""
    numbers = open_set(
        GALLERY, IDENTITIES, at(45, 40, 0), np.array([7, 7, 7]), at(40, 20), targets=(0.5,)
    )
    assert numbers.rate_at_fpir[0.5] == pytest.approx(1 / 3)


def test_several_gallery_images_of_an_identity_count_as_one():
    numbers = open_set(
        at(0, 80, 90), np.array([7, 7, 3]), at(84), np.array([7]), at(180, 200), targets=(0.5,)
    )
    assert numbers.rate_at_fpir[0.5] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_identities": np.array([5])}, r"probe_identities\[0\] = 5 is not in the gallery"),
        ({"distractor_embeddings": np.ones((0, 2))}, "distractor_embeddings must be"),
        ({"distractor_embeddings": np.ones((3, 4))}, r"must be \[M, 2\]"),
        ({"targets": (0.0,)}, r"targets must be in \(0, 1\)"),
        ({"probe_embeddings": np.zeros((1, 2))}, "probe_embeddings"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "gallery_embeddings": GALLERY,
        "gallery_identities": IDENTITIES,
        "probe_embeddings": at(10),
        "probe_identities": np.array([7]),
        "distractor_embeddings": at(30),
    }
    with pytest.raises(ValueError, match=message):
        open_set(**{**arguments, **change})
