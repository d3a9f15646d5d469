"""Watching thousands of ranks: a real store, three real watchdogs, and the beats of all others."""

import re

import pytest

from tests.support.processes import python

pytestmark = pytest.mark.slow

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
