"""One rank of a run of thousands, alone: what it asks of the others is counted, and nobody answers.

Its process group is torch's fake one, which gives each rank's own rows in the place of all others'.

    python -m tests.support.one_of_many SETTINGS RANK RANKS STEPS    # prints the counts as JSON
"""

import json
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from partialfc.config import load
from partialfc.distributed import links
from partialfc.distributed.ranks import Ranks
from partialfc.head import shard
from partialfc.model import build
from partialfc.runtime.process import Runtime
from partialfc.training import run
from tests.support.collectives import Collectives

messages = Counter()


class Echo:
    """Another rank that says what it is told."""

    def __init__(self):
        self.heard = bytearray()

    def sendall(self, data):
        messages["sent"] += 1
        messages["bytes"] += len(data)
        self.heard += data

    def recv_into(self, view):
        said, self.heard = self.heard[: len(view)], self.heard[len(view) :]
        view[: len(said)] = said
        return len(said)

    def shutdown(self, how):
        """Nothing: no connection."""

    def close(self):
        """Nothing either."""


def meet(self, listener, token, every):
    assert len(every) == self.size
    messages["links"] += 2 * links.rounds(self.size)
    self._to = [Echo() for _ in range(links.rounds(self.size))]
    self._from = self._to


class AtOnce:
    """What a thread would do beside the step, before the next line: a count needs no luck."""

    def __init__(self, *words, **more):
        """No thread."""

    def submit(self, function, *words):
        done = Future()
        done.set_result(function(*words))
        return done

    def shutdown(self, wait):
        """Nothing to wait for."""


class Replica(nn.Module):
    """In the place of DDP, which the fake group cannot answer: an all-reduce for each bucket, of
    the same bytes on any number of ranks."""

    def __init__(self, module, **how):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


class Enough(Exception):
    """As many steps as were asked for."""


def main(settings, rank, ranks, steps):
    """Begin a run and take some steps; return counts of the start and of the last step."""
    links.ThreadPoolExecutor = AtOnce
    links.Links._meet, build.DistributedDataParallel = meet, Replica
    shard.refuse_broadcast = lambda *words: None  # all others are copies here
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    config = load(Path(settings))
    seen, opened, at = Collectives(), [], []
    sys.addaudithook(lambda event, words: opened.append(words[0]) if event == "open" else None)
    step = run.train_step

    def counted(*words, **more):
        at.append((len(seen.seen), len(opened), dict(messages)))
        if len(at) > steps:
            raise Enough
        return step(*words, **more)

    run.train_step = counted
    try:
        with seen:
            run.train(config, Runtime(Ranks.of(), torch.device("cpu")))
    except Enough:
        pass
    (first, files, said), (before, _, said_before), (last, _, said_last) = at[0], at[-2], at[-1]
    return {
        "start": summed(seen.seen[:first], said),
        "files": files,
        "step": summed(
            seen.seen[before:last],
            {name: said_last[name] - said_before[name] for name in said_last},
        ),
    }


def summed(seen, said):
    """Collectives by kind, the bytes that this rank brings to them, and messages on links."""
    return {
        "collectives": dict(Counter(name for name, _ in seen)),
        "bytes": sum(size for _, size in seen),
        "on links": said,
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(main(words[0], *map(int, words[1:]))))
