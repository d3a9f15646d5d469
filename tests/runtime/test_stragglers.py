"""R15: a rank that is 50 ms late in every step is named within 50 steps."""

import pytest
import torch
import torch.distributed as dist

from partialfc.distributed import ranks as collectives
from partialfc.distributed.ranks import gather_rows
from partialfc.runtime.stragglers import Stragglers, slowest
from tests.support.models import runtime
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed


class Clock:
    """Stands still but for what is added to it, and for a collective, which ends when the last rank
    has come: what a rank waits is then what a test says, however busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def gathering(self, gather):
        def gathered(*words, **named):
            gather(*words, **named)
            latest = torch.tensor(self.now, dtype=torch.float64)
            dist.all_reduce(latest, dist.ReduceOp.MAX)
            self.now = latest.item()

        return gathered


def late_on_rank(rank, world_size, late, seconds):
    """Looks at 30 steps; ``late`` is late in each, or where it is ``None`` all are in turns."""
    ranks, clock = runtime().ranks, Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "time", clock)
        patch.setattr(collectives, "_all_gather", clock.gathering(collectives._all_gather))
        stragglers, found = Stragglers(ranks, torch.device("cpu")), []
        for step in range(1, 31):
            clock.now += 0.1
            if rank == (step % world_size if late is None else late):
                clock.now += seconds
            gather_rows(torch.zeros(4), ranks)
            if step % 10 == 0:
                found.append(stragglers.look(10, 0.1))
    return found


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (3, 2)])
def test_the_late_rank_is_named_by_all_within_two_looks(world_size, late):
    for looks in run_on_ranks(world_size, late_on_rank, late, 0.05):
        assert [look.rank for look in looks] == [late] * 3
        assert [look.slow for look in looks] == [False, True, True]
        assert [look.seconds for look in looks] == pytest.approx([0.05] * 3)


def test_even_ranks_are_not_named():
    for looks in run_on_ranks(2, late_on_rank, None, 0.05):
        assert not any(look.slow for look in looks)


def test_the_slowest_waits_least():
    assert slowest([0.06, 0.0, 0.05]) == (1, pytest.approx(0.055))
    assert slowest([0.0, 0.05]) == (0, 0.05)
