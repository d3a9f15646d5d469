"""What watching costs: as much with thousands of ranks as with a few, and none is missed."""

import re
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from partialfc.distributed.ranks import Ranks
from partialfc.runtime.beats import Beat
from partialfc.runtime.board import Board, Verdict
from tests.support.processes import python

MANY = """
import sys, threading, time
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
import json
import torch.distributed as dist
from partialfc.distributed.ranks import Ranks
from partialfc.records.ledger import Ledger
from partialfc.runtime.beats import Beat
from partialfc.runtime.watchdog import Watchdog

folder, size, lost = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
watched = {"observer": 0, "one": size // 2, "last": size - 1}

class Counted:
    def __init__(self, store):
        self.store, self.requests, self.keys = store, 0, 0
    def __getattr__(self, name):
        def ask(*words):
            self.requests += 1
            self.keys += len(words[0]) if isinstance(words[0], list) else 1
            return getattr(self.store, name)(*words)
        return ask

def tell(number, ranks):
    beats = [json.dumps(astuple(Beat(number, 3, "save", 3, False)))] * len(ranks)
    client.multi_set([f"watchdog/beat/{rank}" for rank in ranks], beats)

client = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=60))
others = [rank for rank in range(size) if rank not in watched.values()]
tell(1, others)
dogs = {}
for name, rank in watched.items():
    ledger = Ledger(folder / f"{name}.jsonl")
    ledger.at(2)
    ledger.at(3)
    ledger.switch("save")
    store = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=60))
    dogs[name] = Watchdog(Ranks(rank, size), folder, 6.0, store)
    dogs[name].follow(ledger)
    dogs[name]._board._store = Counted(dogs[name]._board._store)

def go_on():
    number, ranks = 1, others
    while True:
        number += 1
        if number == 10:
            ranks = [rank for rank in others if rank != lost]
            print("now", flush=True)
        tell(number, ranks)
        time.sleep(1)

threading.Thread(target=go_on, daemon=True).start()
time.sleep(4)  # all stand still for long enough to be looked at
before = {name: (dog._board._store.requests, dog._board._store.keys) for name, dog in dogs.items()}
time.sleep(4)
for name, dog in dogs.items():
    requests, keys = before[name]
    print(name, dog._board._store.requests - requests, dog._board._store.keys - keys, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 4096])
def test_a_look_costs_as_much_with_thousands_of_ranks(tmp_path, size):
    """A real store ended 4,096 ranks that saved for a minute: each read the beats of all."""
    done = python("-c", MANY, tmp_path, size, size // 3, timeout=60)
    assert done.returncode == 6, done.stderr
    assert f"rank {size // 3} gave no sign of life for " in done.stderr
    counts = {
        name: (int(a), int(b)) for name, a, b in re.findall(r"(\w+) (\d+) (\d+)", done.stdout)
    }
    requests, keys = counts["one"]
    assert requests <= 3 * 5  # in 4 seconds: a look comes each second here, in a run each two
    assert keys <= 5 * 5
    assert counts["observer"][1] >= size  # or the count would be of nothing


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


def test_a_store_that_answers_slowly_is_there():
    """At 4,096 ranks a look took longer than a rank may be silent, and the run was ended."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    first = board(server, 0)
    answered = first.answered
    ended = threading.Event()
    threading.Timer(0.2, ended.set).start()
    while not ended.is_set():
        first.news()
    assert first.answered - answered > 0.1
    assert time.monotonic() - first.answered < 1
