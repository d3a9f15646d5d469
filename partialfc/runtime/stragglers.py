"""Which rank the others wait for: measured in front of the head's first collective of a step.

Every step begins with an all-gather, where fast ranks wait for slow ones and a slow one waits for
nobody. So the rank that waits least is the slowest, by as much as the others wait longer.
"""

from dataclasses import dataclass
from statistics import median

import torch

from partialfc.distributed.ranks import Ranks, gather_rows, wait_seconds

_SECONDS = 0.02
_SHARE = 0.05
"""A rank is slow if the others wait so long for it, and so much of a step."""


@dataclass(frozen=True, slots=True)
class Slowest:
    """The slowest rank since the look before.

    Attributes:
        rank: Which.
        seconds: How much longer the others wait in a step.
        slow: Whether it was slow in two looks one after the other.
    """

    rank: int
    seconds: float
    slow: bool


class Stragglers:
    """Compares the waits of the ranks; every rank calls the same methods.

    Args:
        ranks: This rank among all.
        device: Where a collective finds a tensor.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._waited = _waited()
        self._suspect: int | None = None
        self._named: int | None = None

    def skip(self) -> None:
        """Leave out what was waited for since the last look: it was no training."""
        self._waited = _waited()

    def look(self, steps: int, step_seconds: float) -> Slowest | None:
        """Return the slowest rank of the last steps; rank 0 says when one becomes slow, and when
        it no longer is. Collective: one all-gather of a number; a host synchronisation.

        Args:
            steps: Since the last look.
            step_seconds: That one of them took.
        """
        if self._ranks.size == 1:
            return None
        own = torch.tensor([(_waited() - self._waited) / steps], device=self._device)
        waits = gather_rows(own, self._ranks).tolist()
        self.skip()
        rank, seconds = slowest(waits)
        suspect = rank if seconds > max(_SECONDS, _SHARE * step_seconds) else None
        slow = suspect is not None and suspect == self._suspect
        self._suspect = suspect
        if self._ranks.rank == 0:
            self._say(rank if slow else None, suspect, seconds)
        return Slowest(rank, seconds, slow)

    def _say(self, slow: int | None, suspect: int | None, seconds: float) -> None:
        if slow is not None and slow != self._named:
            print(
                f"rank {slow} is slow: the others wait {seconds * 1e3:.0f} ms for it in every step",
                flush=True,
            )
            self._named = slow
        elif suspect is None and self._named is not None:
            print(f"rank {self._named} is no longer slow", flush=True)
            self._named = None


def slowest(waits: list[float]) -> tuple[int, float]:
    """Return the rank that waits least, and how much longer the median of the others waits."""
    rank = min(range(len(waits)), key=waits.__getitem__)
    others = waits[:rank] + waits[rank + 1 :]
    return rank, median(others) - waits[rank]


def _waited() -> float:
    return wait_seconds().get("all_gather", 0.0)
