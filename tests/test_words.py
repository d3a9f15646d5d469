"""Numbers and names in messages, at the places where a unit or a number of names changes."""

import pytest

from partialfc.words import duration, names_of, rate, size


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.254, "0.25 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3600 * 4 + 60 * 5 + 9, "4 h 5 min"),
        (86400 * 2 + 3600 * 3, "2 d 3 h"),
    ],
)
def test_a_duration_has_one_or_two_units(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0"), (0.473, "0.47"), (9.96, "10"), (12.4, "12"), (6480.2, "6,480")]
)
def test_a_slow_rate_is_not_zero(count, words):
    assert rate(count) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1023 B"),
        (3 << 20, "3 MiB"),
        (1.5 * 2**50, "1536 TiB"),
    ],
)
def test_bytes_have_three_digits(count, words):
    assert size(count) == words


def test_no_more_than_eight_ranks_are_named():
    assert names_of([3]) == "rank 3"
    assert names_of([4, 1]) == "ranks 1, 4"
    assert names_of(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
