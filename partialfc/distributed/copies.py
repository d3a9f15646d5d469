"""Which ranks hold the class centers together, where several copies of them are held.

W ranks hold G copies, m = W / G ranks each. Rank r is in copy r // m, at place r % m of it: a copy
lies on ranks that follow one another, so on one node or a few, and the ranks of one place, which
hold the same rows, have one of each copy.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from partialfc.distributed.ranks import Ranks
from partialfc.distributed.shares import Shares, uneven_copies, wrong_copies

_made: WeakKeyDictionary[Any, dict[int, tuple[Ranks, Ranks]]] = WeakKeyDictionary()
"""By process group and ranks per copy."""


@dataclass(frozen=True, slots=True)
class Copies:
    """This rank among those of its copy, and among those that hold the same rows.

    Attributes:
        every: All ranks.
        within: Those of this rank's copy; ``within.rank`` is its place.
        across: Those of its place; ``across.rank`` is the number of its copy, ``across.size`` G.
    """

    every: Ranks
    within: Ranks
    across: Ranks

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, ranks_per_copy: int | None) -> "Copies":
        """Return the copies on the ranks of a group; ``None``, or as many as there are: one copy.

        Collective with several copies, the first time: two process groups, each made by its members
        alone, which all heads share.

        Raises:
            ValueError: If the ranks do not divide by ``ranks_per_copy``.
        """
        every = Ranks.of(group)
        size = every.size if ranks_per_copy is None else min(ranks_per_copy, every.size)
        if problem := wrong_copies(size, every.size):
            raise ValueError(problem)
        if size == every.size:
            return cls(every, every, Ranks())
        made = _made.setdefault(every.group or dist.group.WORLD, {})
        if size not in made:
            copy, place = divmod(every.rank, size)
            made[size] = (
                _ranks(every, range(copy * size, (copy + 1) * size)),
                _ranks(every, range(place, every.size, size)),
            )
        return cls(every, *made[size])

    @property
    def count(self) -> int:
        """G."""
        return self.across.size

    @property
    def first(self) -> bool:
        """Whether this rank's copy is the one that is written."""
        return self.across.rank == 0

    def shares(self, shares: Shares | None) -> Shares | None:
        """Return the shares of this rank's copy, from those of all ranks.

        Raises:
            ValueError: If two copies have not the same number of rows.
        """
        if shares is None or self.count == 1:
            return shares
        size = self.within.size
        if problem := uneven_copies(size, shares):
            raise ValueError(f"{problem}.")
        start = self.across.rank * size
        return Shares(shares.sizes[start : start + size])


def _ranks(every: Ranks, members: range) -> Ranks:
    """Some of the ranks as a group of their own; of one alone, which needs none, no group."""
    place = members.index(every.rank)
    if len(members) == 1:
        return Ranks()
    parent = every.group or dist.group.WORLD
    assert parent is not None
    group = dist.new_group(
        [dist.get_global_rank(parent, rank) for rank in members],
        timeout=_patience(parent),
        use_local_synchronization=True,  # or all ranks would make all groups
    )
    return Ranks(place, len(members), group)


def _patience(group: Any) -> timedelta | None:
    """How long the collectives of a group may take; ``None`` where torch does not say."""
    kind = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    options = getattr(group._get_backend(torch.device(kind)), "options", None)
    patience: timedelta | None = getattr(options, "_timeout", None)
    return patience
