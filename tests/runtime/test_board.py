"""What watching costs: as much with thousands of ranks as with a few, and none is missed."""

from types import SimpleNamespace

import torch.distributed as dist

from partialfc.distributed.ranks import Ranks
from partialfc.runtime import board as of_board
from partialfc.runtime.beats import Beat
from partialfc.runtime.board import Board, Verdict


def board(store, rank, size=3):
    return Board(store, Ranks(rank, size))


def test_who_has_not_begun_and_who_has_left_has_no_beat():
    """To ask a store for what nobody has set waits for it."""
    store = dist.HashStore()
    first, last = board(store, 0), board(store, 2)
    beat = Beat(1, 5, "train", 9, False)
    first.beat(beat)
    assert last.beats(range(3)) == {0: beat}
    last.beat(beat)
    assert first.beats(range(3)) == {0: beat, 2: beat}
    last.beat(None)
    assert first.beats(range(3)) == {0: beat}


def test_the_first_verdict_and_the_first_failure_are_everybodys():
    """Two observers find a hang at one time, and a rank that fails takes others with it."""
    store = dist.HashStore()
    first, last = board(store, 0), board(store, 2)
    assert not first.news()
    assert (first.verdict(), first.failure()) == (None, None)
    found = Verdict("rank 1 holds up the others", 2)
    assert first.pronounce(found) == found
    assert last.pronounce(Verdict("another", 1)) == found
    assert last.news()
    last.fail({"rank": 2})
    first.fail({"rank": 0})
    assert first.failure() == {"rank": 2}


def test_few_look_for_a_lost_rank_and_all_learn_who_it_was():
    store = dist.HashStore()
    ranks = [board(store, rank, 100) for rank in range(100)]
    assert sum(rank.may_look() for rank in ranks) == 4
    assert ranks[50].lost() is None
    ranks[7].found_lost("rank 9 was lost at step 4 (train)")
    assert ranks[50].lost() == "rank 9 was lost at step 4 (train)"


def test_a_store_that_answers_slowly_is_there(monkeypatch):
    """At 4,096 ranks a look took longer than a rank may be silent, and the run was ended."""
    clock = [100.0]
    monkeypatch.setattr(of_board, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    first = board(dist.HashStore(), 0)
    for ask in (first.news, first.failure, lambda: first.beats(range(3)), lambda: first.beat(None)):
        clock[0] += 50
        ask()
        assert first.answered == clock[0]
