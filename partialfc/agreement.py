"""What one rank knows and all must act on at the same step, without waiting for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from partialfc.collectives import Ranks


@contextmanager
def any_rank(known: Callable[[], bool], ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Return a function for the end of every step: whether ``known()`` was true on any rank.

    It answers the same on every rank, one call late: a call starts an all-reduce of one integer
    between the hosts, which runs beside the next step, and returns the answer of the call before.
    No GPU takes part. Collective: a process group, and one all-reduce per call.
    """
    if ranks.size == 1:
        yield known
        return
    group = dist.new_group(backend="gloo")
    flag = torch.zeros((), dtype=torch.int32)
    pending: dist.Work | None = None

    def agreed() -> bool:
        nonlocal pending
        answer = False
        if pending is not None:
            pending.wait()
            answer = bool(flag)
        flag.fill_(known())
        pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=group, async_op=True)
        return answer

    yield agreed
    if pending is not None:
        pending.wait()
