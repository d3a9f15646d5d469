"""What ranks agree on, in real processes."""

import pytest

from partialfc.distributed.agreement import all_agree, from_leader, largest, words_of_any
from tests.support.models import runtime
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed


def agree_on_rank(rank, world_size):
    ranks = runtime().ranks
    return (
        all_agree(True, ranks),
        all_agree(rank != 1, ranks),
        from_leader(10 + rank, ranks),
        largest(2**40 + rank, ranks),
    )


def test_small_agreements():
    assert run_on_ranks(3, agree_on_rank) == [(True, False, 10, 2**40 + 2)] * 3


def words_on_rank(rank, world_size, words):
    return words_of_any(words[rank], runtime().ranks)


@pytest.mark.parametrize("words", [("", "", ""), ("a", "", ""), ("", "größer", "b")])
def test_what_one_rank_knows_all_can_say(words):
    """Of the lowest rank that knows anything, whole, in any letters."""
    assert run_on_ranks(3, words_on_rank, words) == [max(words[:2])] * 3
