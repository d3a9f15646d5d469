"""Files and connections that a rank may have open: counted first, and never called a lost rank."""

import re

import pytest

from partialfc.runtime.descriptors import needed
from tests.support.processes import python

LIMITS = """
import os, resource, sys
from partialfc.config import ConfigError
from partialfc.runtime import descriptors
from partialfc.runtime.place import Place

resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[1])))
place = Place(1, int(sys.argv[2]))
try:
    descriptors.refuse_too_few(place, nccl=sys.argv[3] == "nccl")
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
    few, many = (sum(needed(0, size, nccl=True).values()) for size in (64, 4096))
    assert many - few == 2 * 2 * 6
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert needed(0, 4096, nccl=True)["the store"] == 2 * 4097  # rank 0 serves all
    assert needed(1, 4096, nccl=True)["the store"] == 2


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
    done = python("-c", RUNS_OUT, tmp_path, what, ranks=2, timeout=60)
    assert re.search(r"ConfigError: too many open files \(.*needs about", done.stdout), done
    assert "was lost" not in done.stdout
    assert done.returncode == 2
