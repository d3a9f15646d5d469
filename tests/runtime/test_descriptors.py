"""Files and connections that a rank may have open: counted first, and never called a lost rank."""

import os
import re
import sys
from itertools import pairwise

import pytest
import torch.distributed as dist

from partialfc.config import Config
from partialfc.distributed.copies import Copies
from partialfc.runtime.descriptors import Groups, needed
from partialfc.runtime.place import Place
from tests.support.processes import python
from tests.support.ranks import run_on_ranks

NCCL = Groups(nccl=True)

LIMITS = """
import os, resource, sys
from partialfc.config import ConfigError
from partialfc.runtime import descriptors
from partialfc.runtime.place import Place

resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[1])))
place = Place(1, int(sys.argv[2]))
try:
    descriptors.refuse_too_few(place, descriptors.Groups(nccl=sys.argv[3] == "nccl"))
except ConfigError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_is_raised_and_one_that_is_too_low_is_refused_with_its_sum():
    """1,024 descriptors ended runs of 330 ranks, long after the start: "a rank was lost"."""
    said = python("-c", LIMITS, 1024, 4096, "gloo").stdout
    assert "a rank of 4,096 needs about 4,403 descriptors of 1,024 allowed (4,095 for gloo" in said
    assert "LimitNOFILE" in said
    assert "(1024, 1024)" in said
    assert python("-c", LIMITS, 8192, 4096, "gloo").stdout == "(8192, 8192)\n"


def test_beside_nccl_they_grow_with_the_logarithm_of_the_ranks(monkeypatch):
    """Two gloo groups beside NCCL were 8,190 connections of each of 4,096 ranks."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    few, many = (sum(needed(0, size, NCCL).values()) for size in (64, 4096))
    assert many - few == 2 * 2 * 6
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert needed(0, 4096, NCCL)["the store"] == 2 * 4097  # rank 0 serves all
    assert needed(1, 4096, NCCL)["the store"] == 2


def sockets():
    with os.scandir("/proc/self/fd") as opened:
        return sum(os.path.realpath(each.path).split("/")[-1][:7] == "socket:" for each in opened)


def sockets_on_rank(rank, world_size, sizes):
    """Those that copies of the class centers open, each of ``sizes`` ranks."""
    every, counts = dist.new_group(range(world_size)), [sockets()]
    for ranks_per_copy in sizes:
        Copies.of(every, ranks_per_copy)
        counts.append(sockets())
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed by Linux")
def test_copies_of_class_centers_connect_as_many_ranks_as_are_counted():
    """On a CPU; beside NCCL they are its own."""
    for opened in run_on_ranks(6, sockets_on_rank, (1, 2, 3)):
        for ranks, count, groups in zip((1, 2, 3), opened, (1, 2, 2), strict=True):
            copies = frozenset([ranks])
            more = Groups(nccl=False, ranks_per_copy=copies).of_gloo(6) - 5
            assert count == more + groups, "and one that each group listens on"
            assert Groups(nccl=True, ranks_per_copy=copies).of_gloo(6) == 0


@pytest.mark.parametrize(
    ("settings", "gloo"),
    [
        ({}, 7),
        ({"head": {"ranks_per_copy": 8}}, 7),
        ({"head": {"ranks_per_copy": 2}}, 7 + 1 + 3),
        ({"heads": {"a": {"ranks_per_copy": 2}, "b": {"ranks_per_copy": 2}}}, 7 + 1 + 3),
        ({"heads": {"a": {"ranks_per_copy": 2}, "b": {"ranks_per_copy": 4}}}, 7 + 4 + 4),
        ({"checkpoint": {"peers_every_steps": 5}}, 7),
    ],
    ids=str,
)
def test_groups_of_a_run_are_those_of_its_settings(settings, gloo):
    """Of 8 ranks; heads of as many ranks a copy share their groups."""
    sets = {name: {"train": f"{name}.rec", "share": 0.5} for name in settings.get("heads", ())}
    data = {"sets": sets} if sets else {"train": "x.rec"}
    run = {"folder": "runs/a", "device": "cpu", "epochs": 1}
    config = Config.model_validate({"data": data, "run": run, **settings})
    parts = needed(1, 8, Groups.of(config, Place(1, 8), nccl=False))
    assert parts["gloo's connections with other ranks"] == gloo


RUNS_OUT = """
import os, resource, sys
import torch.distributed as dist
from partialfc.config import Config
from partialfc.errors import exit_code_of
from partialfc.runtime.process import running

settings = {"data": {"train": "x.rec"}, "precision": {"compute": "fp32"}}
settings |= {"run": {"folder": sys.argv[1], "device": "cpu"}}
try:
    with running(Config.model_validate(settings)) as runtime:
        kept = []
        if runtime.ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
            left = 149 - len(os.listdir("/proc/self/fd")) if sys.argv[2] == "gloo" else 150
            kept = [os.dup(0) for _ in range(left)]
        if sys.argv[2] == "gloo":
            dist.new_group([0, 1], backend="gloo")
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(exit_code_of(error))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["files", "gloo"])
def test_who_can_open_no_more_says_so_and_is_not_called_lost(what, tmp_path):
    """gloo's error is one of its connections, as when another rank is gone."""
    done = python("-c", RUNS_OUT, tmp_path, what, ranks=2)
    assert re.search(r"ConfigError: too many open files \(.*needs about", done.stdout), done
    assert "was lost" not in done.stdout
    assert done.returncode == 2
