"""The files of a checkpoint of thousands of ranks, written and read by each of them, one by one.

Real files of a small head: every number is a function of its global row, so what is read is known.
The process group is torch's fake one, and opens of files are counted.

    python -m tests.support.many_ranks_files FOLDER save:STEP:RANKS load:STEP:RANKS[:EVERY] ...

prints a line of JSON for each word: opens of each rank by kind of file. With EVERY it is some
ranks.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from partialfc import ArcFace, Nearest, PartialFC, RowSGD
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint import saving
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import path_of
from partialfc.distributed.links import Links
from partialfc.distributed.ranks import Ranks
from partialfc.model import build
from partialfc.model.batch_norm import statistics
from partialfc.runtime.process import Runtime
from tests.support.models import settings
from tests.support.one_of_many import Replica

IDENTITIES, DIM, SHARDS = 20_011, 4, 4096
FACTS = {"seed": 2048}

opened = []
"""Names of files, since the last rank."""


class OneDisk(Disk):
    """Of all ranks: the folder that rank 0 begins with has the files of the others already."""

    def make_folder(self, path):
        path.mkdir(parents=True, exist_ok=True)

    def remove(self, path):
        if not path.name.endswith(".partial"):
            super().remove(path)

    def sync(self, path):
        """Nothing here loses its power."""


def expected(head):
    """What the rows of a rank hold, by name."""
    rows = torch.arange(head.owned_rows.start, head.owned_rows.stop).unsqueeze(1)
    live = {"centers": head.centers.data, **head.optimizer.states(), **head.lists()}
    return live, {
        name: (rows * (number + 1) + torch.arange(one.shape[1])).remainder(30_000).to(one.dtype)
        for number, (name, one) in enumerate(sorted(live.items()))
    }


def model_of(rank, ranks):
    """A rank's model; nothing in it is drawn at random."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    config = settings(data={"train": "unused.rec", "global_batch": ranks})
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM), nn.BatchNorm1d(DIM))
    head = PartialFC(
        IDENTITIES,
        DIM,
        ArcFace(scale=16),
        sample_rate=0.5,
        optimizer=RowSGD(lr=0.1, momentum=0.9, unsampled="move"),
        canonical_shards=SHARDS,
        negatives=Nearest(neighbours=2),
    )
    runtime = Runtime(Ranks.of(), torch.device("cpu"))
    return build.assemble(config, runtime, network, head), runtime


def save(folder, step, ranks):
    """Write the part of every rank, rank 0 last, which commits; return the opens of each."""
    counts = []
    for rank in [*range(1, ranks), 0]:
        model, runtime = model_of(rank, ranks)
        live, values = expected(model.head)
        for name, one in live.items():
            one.copy_(values[name])
        for one in statistics(model.backbone).values():
            one.fill_(rank)
        final = path_of(folder, step)
        final.with_name(f".{final.name}.partial").mkdir(parents=True, exist_ok=True)
        saver = saving.Saver(folder, FACTS, runtime, keep=9, disk=OneDisk())
        saver._mark = step
        opened.clear()
        with saver:
            saver.save(step, model)
        counts.append(counted())
        dist.destroy_process_group()
    return counts


def load(folder, step, ranks, every=1):
    """Read what some ranks read; return the opens of each, and those of looking at all files."""
    path, counts, looks = path_of(folder, step), [], []
    for rank in range(0, ranks, every):
        model, runtime = model_of(rank, ranks)
        opened.clear()
        assert checkpoint.named(path, runtime, content=False) == path
        looks.append(counted())
        opened.clear()
        assert checkpoint.load(path, model, FACTS, runtime) == step
        counts.append(counted())
        live, values = expected(model.head)
        for name, one in live.items():
            assert torch.equal(one, values[name]), (rank, name)
        dist.destroy_process_group()
    return {"load": counts, "look": looks}


def counted():
    """Opens by kind, and the bytes of manifests and notes."""
    found = Counter()
    for path in map(Path, opened):
        kind = path.name.partition("_")[0].partition(".")[0]
        found[f"{kind}{path.suffix}"] += 1
        if path.suffix == ".json":
            final = path.parent.with_name(path.parent.name.strip(".").removesuffix(".partial"))
            there = path if path.exists() else final / path.name
            found["bytes said"] += there.stat().st_size
    return dict(found)


def main(folder, *words):
    """Do what is asked, word by word, and print the counts of each."""
    build.DistributedDataParallel = Replica
    saving.yield_to_training = lambda: None  # there is no training
    Links._meet = lambda self, listener, token, known: None  # no messages: all others agree
    Links._spread = lambda self, known, join: known

    def note(event, about):
        if event == "open" and str(about[0]).startswith(str(folder)):
            opened.append(str(about[0]))

    sys.addaudithook(note)
    for word in words:
        what, *numbers = word.split(":")
        found = {"save": save, "load": load}[what](folder, *map(int, numbers))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
