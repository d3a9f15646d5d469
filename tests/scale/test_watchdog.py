"""Watching thousands of ranks: a real store, three real watchdogs, and the beats of all others."""

import json

import pytest

from tests.support.processes import python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [64, 4096])
def test_a_look_costs_as_much_with_thousands_of_ranks(tmp_path, size):
    """A real store ended 4,096 ranks that saved for a minute: each read the beats of all."""
    done = python("-m", "tests.support.many_beats", tmp_path, size, size // 3)
    assert done.returncode == 6, done.stderr
    assert f"rank {size // 3} gave no sign of life for " in done.stderr
    asked = json.loads(done.stdout.splitlines()[0])["asked"]
    looks = asked["one"]["looks"] + 1  # one may be half done
    assert asked["one"]["requests"] <= 3 * looks
    assert asked["one"]["keys"] <= 5 * looks
    assert asked["observer"]["keys"] >= size  # or the count would be of nothing
