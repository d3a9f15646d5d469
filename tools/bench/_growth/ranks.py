"""What ranks ask of one another, by their number: real stores, sockets and files."""

import importlib
import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from partialfc.distributed.links import Links, rounds
from partialfc.distributed.ranks import Ranks
from partialfc.errors import HangError
from tools.bench._growth.programs import ran

# By name, for mypy not to follow it into the tests, which are not typed.
many_beats = importlib.import_module("tests.support.many_beats")
Together = importlib.import_module("tests.support.together").Together

Found = dict[str, Any]
_QUESTIONS = 50
_WAIT = timedelta(seconds=60)


def watchdog(ranks: int, folder: Path) -> Found:
    """Beats of all ranks at a real store: what a look asks, and how soon a lost rank is named."""
    lost = ranks // 3
    done = ran("-m", "tests.support.many_beats", folder, ranks, lost, status=HangError.exit_code)
    if f"rank {lost} gave no sign of life for" not in done.stderr:
        raise RuntimeError(f"rank {lost} was not named: {done.stderr[-500:]}")
    asked, last_beat, verdict = (json.loads(line) for line in done.stdout.splitlines())
    seconds = asked["server's CPU seconds"]
    whole = seconds["one look at the beats of all"]
    return {
        "requests_of_a_rank_in_4_looks": asked["asked"]["one"]["requests"],
        "server_seconds_of_a_look_by_every_rank": seconds["a look of every rank"] + 2 * whole,
        "server_seconds_if_every_rank_read_all_beats": ranks * whole,
        "wall_seconds_from_the_last_beat_to_its_name": verdict["named"] - last_beat["lost"],
        "of_which_a_rank_may_be_silent": many_beats.SILENCE,
    }


def names(connections: int, folder: Path) -> Found:
    """Connections to the store, whose server asks for the name of each, one after the other."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nobody's: nothing is sent
        own = probe.getsockname()[0]
    for name, address in (("in_etc_hosts", "127.0.0.1"), ("of_the_network", own)):
        server = dist.TCPStore(address, 0, is_master=True, timeout=_WAIT, wait_for_workers=False)
        began = time.monotonic()
        for _ in range(connections):
            dist.TCPStore(address, server.port, timeout=_WAIT).set("here", "1")
        found[f"wall_seconds_of_one_{name}"] = (time.monotonic() - began) / connections
    return found


def flag(ranks: int, folder: Path) -> Found:
    """Whether any rank was asked to stop: by links, and by gloo's ring as far as files last."""
    store = dist.HashStore()
    found = {"messages": rounds(ranks), **_asked("links", ranks, _links)}
    if 1.2 * ranks * ranks < resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        found |= _asked("ring", ranks, lambda place: _ring(store, place))
    return found


Ask = Callable[[bool], bool]


@contextmanager
def _links(place: Ranks) -> Iterator[Ask]:
    with Links(place, "127.0.0.1", 60.0) as links:
        yield links.any


@contextmanager
def _ring(store: dist.Store, place: Ranks) -> Iterator[Ask]:
    group: Any = dist.ProcessGroupGloo(store, place.rank, place.size, _WAIT)
    largest: Any = dist.AllreduceOptions()
    largest.reduceOp = dist.ReduceOp.MAX

    def ask(own: bool) -> bool:
        known = torch.tensor([int(own)])
        group.allreduce([known], largest).wait()
        return bool(known)

    yield ask


def _asked(name: str, ranks: int, make: Callable[[Ranks], AbstractContextManager[Ask]]) -> Found:
    """Ranks as threads with real sockets: CPU seconds of one of them, and all of its machine's."""
    together, before = Together(ranks), _open_files()

    def on_rank(place: Ranks) -> Found:
        with make(place) as ask:
            ask(False)
            together.gather(None, place)
            opened = _open_files() - before
            cpu, wall = time.process_time(), time.monotonic()
            together.gather(None, place)
            answers = [ask(place.rank == number % ranks) for number in range(_QUESTIONS)]
            together.gather(None, place)
            assert all(answers), "one rank knew each time"
            return {
                f"{name}_descriptors": opened / ranks,
                f"{name}_seconds": (time.process_time() - cpu) / _QUESTIONS / ranks,
                f"{name}_wall_seconds": (time.monotonic() - wall) / _QUESTIONS,
            }

    first: Found = together.run(on_rank)[0]
    return first


def parts(ranks: int, folder: Path) -> Found:
    """A checkpoint's real files, of a small head: what three quarters of the ranks open of them."""
    words = f"save:1:{ranks}", f"load:1:{ranks * 3 // 4}"
    done = ran("-m", "tests.support.many_ranks_files", folder, *words)
    counts = json.loads(done.stdout.splitlines()[-1])["load"]
    opens = [one["centers.safetensors"] for one in counts]
    return {
        "ranks_that_load": len(counts),
        "opens": sum(opens),
        "opens_of_a_rank_at_most": max(opens),
        "bytes_of_manifest_and_notes_of_a_rank_at_most": max(one["bytes said"] for one in counts),
    }


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
