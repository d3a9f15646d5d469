"""Who holds up the others, as a function of what the ranks last told."""

import threading

import pytest
import torch.distributed as dist

from partialfc.distributed.ranks import Ranks
from partialfc.runtime.beats import Beat, Sight, verdict
from partialfc.runtime.watchdog import Watchdog
from tests.support.waiting import wait_for

SECONDS = 10


def seen(step=5, kind="train", collectives=9, *, alive=100.0, moved=100.0, first=False):
    return Sight(Beat(1, step, kind, collectives, first), alive, moved)


def test_nobody_is_named_where_all_have_left():
    """The thread that watches died of it, with a stack trace."""
    assert verdict({}, 100, SECONDS) is None


def test_a_rank_is_heard_of_before_its_first_wait(tmp_path, monkeypatch):
    """A rank that was killed within two seconds of its start was lost without a name."""
    store, done, waits = dist.HashStore(), [], threading.Event.wait

    def wait(event, timeout=None):
        if threading.current_thread().name == "watchdog":
            done.append(store.check(["watchdog/beat/0"]))
        return waits(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    watchdog = Watchdog(Ranks(0, 2), tmp_path, 60, store)
    try:
        assert wait_for(lambda: done)[0]
    finally:
        watchdog.close()


def test_the_silent_rank_is_named_even_while_all_are_waiting():
    found = verdict({0: seen(moved=50), 1: seen(alive=80, moved=50)}, 100, SECONDS)
    assert found[0] == [1]
    assert "rank 1 gave no sign of life for 20 s" in found[1]
    assert "step 5 (train)" in found[1]


def test_a_rank_that_lives_but_does_not_move_is_named():
    """A loader that never returns: its thread goes on telling, its step does not."""
    waiting = {rank: seen(moved=0, collectives=10) for rank in (0, 1, 3)}
    stuck = {2: seen(kind="data", moved=0)}
    assert verdict({**waiting, **stuck}, 99, SECONDS) is None
    ranks, sentence = verdict({**waiting, **stuck}, 101, SECONDS)
    assert ranks == [2]
    assert sentence == "rank 2 holds up the others at step 5 (data) for 101 s"


@pytest.mark.parametrize(("kind", "first"), [("other", False), ("save", False), ("train", True)])
def test_verification_saves_and_first_steps_have_more_time(kind, first):
    """Rank 0 alone computes some numbers; a first step may compile for minutes."""
    slow = {0: seen(kind=kind, moved=0, alive=590, first=first)}
    others = {1: seen(moved=0, alive=590, collectives=10)}
    assert verdict({**slow, **others}, 599, SECONDS) is None
    assert verdict({**slow, **others}, 599.9, SECONDS) is None
    for one in (*slow.values(), *others.values()):
        one.alive = 601
    assert verdict({**slow, **others}, 601, SECONDS)[0] == [0]


def test_where_none_is_behind_the_collective_is_named():
    found = verdict({rank: seen(moved=0) for rank in range(3)}, 101, SECONDS)
    assert found[0] == [0, 1, 2]
    assert "a collective does not return" in found[1]


def test_progress_of_one_is_no_hang():
    assert verdict({0: seen(moved=100), 1: seen(moved=0)}, 101, SECONDS) is None


def test_a_look_counts_from_when_something_changed():
    one = seen(alive=0, moved=0)
    one.update(Beat(2, 5, "train", 9, False), 7)
    assert (one.alive, one.moved) == (7, 0)
    one.update(Beat(3, 5, "data", 9, False), 8)
    assert (one.alive, one.moved) == (8, 8)
    one.update(Beat(3, 5, "data", 9, False), 9)
    assert (one.alive, one.moved) == (8, 8)
