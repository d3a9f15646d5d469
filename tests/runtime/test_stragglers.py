"""R15: a rank that is 50 ms late in every step is named within 50 steps."""

import time

import pytest
import torch

from partialfc.distributed.ranks import gather_rows
from partialfc.runtime.stragglers import Stragglers, slowest
from tests.support.models import runtime
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed


def late_on_rank(rank, world_size, late, seconds):
    ranks = runtime().ranks
    gather_rows(torch.zeros(4), ranks)  # which of them started first is no part of a step
    stragglers, found = Stragglers(ranks, torch.device("cpu")), []
    for step in range(1, 31):
        if rank == late:
            time.sleep(seconds)
        gather_rows(torch.zeros(4), ranks)
        if step % 10 == 0:
            found.append(stragglers.look(10, 0.1))
    return found


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (3, 2)])
def test_the_late_rank_is_named_by_all_within_two_looks(world_size, late):
    for looks in run_on_ranks(world_size, late_on_rank, late, 0.05):
        assert [look.rank for look in looks] == [late] * 3
        assert [look.slow for look in looks] == [False, True, True]
        assert all(0.03 < look.seconds < 0.2 for look in looks)


def test_even_ranks_are_not_named():
    for looks in run_on_ranks(2, late_on_rank, None, 0):
        assert not any(look.slow for look in looks)


def test_the_slowest_waits_least():
    assert slowest([0.06, 0.0, 0.05]) == (1, pytest.approx(0.055))
    assert slowest([0.0, 0.05]) == (0, 0.05)
