"""Beats of thousands of ranks at a real store, three of which have real watchdogs.

    python -m tests.support.many_beats FOLDER RANKS LOST    # what was asked, as JSON

All stand still in a save, and are looked at; then the beats of one end, and when this is found the
process is ended by a watchdog.
"""

import json
import sys
import threading
import time
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from partialfc.distributed.ranks import Ranks
from partialfc.records.ledger import Ledger
from partialfc.runtime.beats import Beat
from partialfc.runtime.board import Board
from partialfc.runtime.watchdog import Watchdog

SILENCE = 6.0
"""Seconds that a rank may be silent; a look comes each second then, and in a run each two."""
COUNTED = 4
"""Looks over which requests are counted."""


class Counted:
    """A store whose requests, and the keys that they are about, are counted."""

    def __init__(self, store):
        self.store, self.requests, self.keys = store, 0, 0

    def __getattr__(self, name):
        def ask(*words):
            self.requests += 1
            self.keys += len(words[0]) if isinstance(words[0], list) else 1
            return getattr(self.store, name)(*words)

        return ask


class Server:
    """A store, and the CPU time of the thread that answers for it."""

    def __init__(self):
        before = {*Path("/proc/self/task").iterdir()}
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        (self._thread,) = {*Path("/proc/self/task").iterdir()} - before

    def client(self):
        return dist.TCPStore("127.0.0.1", self.store.port, timeout=timedelta(seconds=60))

    def seconds(self):
        return int((self._thread / "schedstat").read_text().split()[0]) / 1e9


def beat_of(number):
    return Beat(number, 3, "save", 3, False)


def tell(client, number, ranks):
    """The beats of all that have no watchdog here, in one request."""
    values = [json.dumps(astuple(beat_of(number)))] * len(ranks)
    client.multi_set([f"watchdog/beat/{rank}" for rank in ranks], values)


def of_server(server, client, size):
    """Seconds of its CPU for a look of every rank, and for one that reads the beats of all."""
    boards = [Board(client, Ranks(rank, size)) for rank in range(size)]
    observers = boards[0].observers

    def looks():
        for rank, board in enumerate(boards):
            board.beat(beat_of(1))
            assert not board.news()
            assert len(board.beats(sorted({rank, *observers}))) >= 2

    tell(client, 1, range(size))
    looks()  # a rank asks once whether another has begun
    boards[0].beats(range(size))
    found = {}
    for name, ask in {
        "a look of every rank": looks,
        "one look at the beats of all": lambda: boards[0].beats(range(size)),
    }.items():
        began = server.seconds()
        ask()
        found[name] = server.seconds() - began
    return found


def main(folder, size, lost):
    """Print what was asked, and when a rank was ``lost`` and ``named``; never return."""
    server = Server()
    client = server.client()
    watched = {"observer": 0, "one": size // 2, "last": size - 1}
    others = [rank for rank in range(size) if rank not in watched.values()]
    of_all = of_server(server, client, size)
    tell(client, 1, others)
    dogs = {}
    for name, rank in watched.items():
        ledger = Ledger(folder / f"{name}.jsonl")
        ledger.at(2)
        ledger.at(3)
        ledger.switch("save")
        dogs[name] = Watchdog(Ranks(rank, size), folder, SILENCE, server.client())
        dogs[name].follow(ledger)
        dogs[name]._board._store = Counted(dogs[name]._board._store)

    counted = threading.Event()

    def go_on():
        number, ranks, told = 1, others, 0.0
        while True:
            number += 1
            if counted.is_set() and ranks is others:
                ranks = [rank for rank in others if rank != lost]
                print(json.dumps({"lost": told}), flush=True)
            tell(client, number, ranks)
            told = time.monotonic()
            time.sleep(1)

    threading.Thread(target=go_on, daemon=True).start()
    time.sleep(4)  # all stand still for long enough to be looked at
    before = {name: counts(dog) for name, dog in dogs.items()}
    asked = {name: dict.fromkeys(of, 0) for name, of in before.items()}
    while min(of["looks"] for of in asked.values()) < COUNTED:
        time.sleep(0.02)
        asked = {
            name: {what: now - before[name][what] for what, now in counts(dog).items()}
            for name, dog in dogs.items()
        }
    print(json.dumps({"asked": asked, "server's CPU seconds": of_all}), flush=True)
    counted.set()
    while not client.check(["watchdog/verdict"]):
        time.sleep(0.01)
    print(json.dumps({"named": time.monotonic()}), flush=True)
    time.sleep(600)  # a watchdog waits for the stacks of all others, of which none comes


def counts(dog):
    store = dog._board._store
    return {"looks": dog._number, "requests": store.requests, "keys": store.keys}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
