"""The collectives of the head, and none where there is one rank.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.shares import Shares

# torch 2.13 gave them new names and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_entered = 0


def entered() -> int:
    """How many of these collectives this rank has entered; those that wait are one ahead."""
    return _entered


def moved() -> None:
    """Tell the watchdog that this rank goes on, where it is long without a collective."""
    _enter()


def _enter() -> None:
    global _entered
    _entered += 1


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among those that share a head.

    Attributes:
        rank: In [0, size).
        size: World size.
        group: Process group; ``None`` for the default one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> "Ranks":
        """The ranks of a group, or a single one where torch.distributed is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


def gather_rows(rows: Tensor, ranks: Ranks, *, beside: bool = False) -> Tensor:
    """Return the rows [n, ...] of all ranks, rank by rank, the same number of each: one all-gather.

    Any dtype that the backend moves: nothing is computed. ``beside``: on a GPU it is behind the
    collectives of a step that does not wait for it, so its time says nothing of the other ranks.
    """
    if ranks.size == 1:
        return rows
    _enter()
    gathered = rows.new_empty(ranks.size * len(rows), *rows.shape[1:])
    with nullcontext() if beside and rows.is_cuda else _timed("all_gather", rows):
        _all_gather(gathered, rows.contiguous(), group=ranks.group)
    return gathered


def sum_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over ranks: one all-reduce, which may reuse the memory of ``value``."""
    if ranks.size > 1:
        _enter()
        with _timed("all_reduce", value):
            dist.all_reduce(value, dist.ReduceOp.SUM, group=ranks.group)
    return value


def max_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    """Return the maximum over ranks: one all-reduce, which may reuse the memory of ``value``."""
    if ranks.size > 1:
        _enter()
        with _timed("all_reduce", value):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=ranks.group)
    return value


def sum_to_owner(gradient_BD: Tensor, ranks: Ranks, shares: Shares | None = None) -> Tensor:
    """Return this rank's rows [b, D] of the sum over ranks: one reduce-scatter.

    Every rank takes part in it with as many rows as the largest of the shares has.
    """
    if ranks.size == 1:
        return gradient_BD
    if shares is not None and not shares.equal:
        parts = torch.split(gradient_BD, list(shares.sizes))
        filled = [F.pad(part, (0, 0, 0, shares.largest - len(part))) for part in parts]
        return sum_to_owner(torch.cat(filled), ranks)[: shares.sizes[ranks.rank]]
    _enter()
    owned_bD = gradient_BD.new_empty(len(gradient_BD) // ranks.size, gradient_BD.shape[1])
    with _timed("reduce_scatter", gradient_BD):
        _reduce_scatter(owned_bD, gradient_BD, group=ranks.group)
    return owned_bD


_seconds: dict[str, float] = {}
_on_device: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()


@contextmanager
def _timed(kind: str, tensor: Tensor) -> Iterator[None]:
    """Add the time inside to :func:`wait_seconds`: the host's on a CPU, the stream's on a GPU."""
    if tensor.is_cuda:
        began, ended = (_event() for _ in range(2))
        began.record()
        yield
        ended.record()
        _on_device.append((kind, began, ended))
        _count_ended()  # at once, so that no more are kept than a GPU is behind
        return
    start = time.monotonic()
    yield
    _seconds[kind] = _seconds.get(kind, 0.0) + time.monotonic() - start


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def wait_seconds() -> dict[str, float]:
    """Return the seconds that this rank spent in collectives so far, by kind.

    Waiting for other ranks and moving bytes are one number here; a rank that the others wait for
    has the smallest. No host synchronisation: what a GPU has not come to yet is left for the next
    call.
    """
    _count_ended()
    return dict(_seconds)


def _count_ended() -> None:
    """Add up what a GPU is done with; no host synchronisation."""
    while _on_device and _on_device[0][2].query():  # type: ignore[no-untyped-call]
        kind, began, ended = _on_device.popleft()
        _seconds[kind] = _seconds.get(kind, 0.0) + began.elapsed_time(ended) / 1e3
