"""How far the ranks have come, and which of them hold up the others: pure functions of beats.

A rank's beat is a number that grows, the optimizer steps that it has taken, what it is doing (a
kind of :mod:`partialfc.records.ledger`), and the head's collectives that it has entered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from partialfc.words import names_of

_PROGRESS = 10
"""A step may take so many times as long as a rank may be silent;"""
_PATIENCE = 60
"""and the first step, verification, a save or a load so many times."""
_WITHIN_STEPS = ("train", "data")
OUTSIDE = "outside of training"
"""What a rank is doing before its ledger is kept, or in a tool: nobody knows how long it takes."""


def longest_patience(seconds: float) -> float:
    """Return how many seconds a rank may hold up the others at most; at least half an hour, as
    nobody knows how long a start takes.

    Args:
        seconds: How long a rank may be silent; 0 where nobody watches.
    """
    return max(1800.0, _PATIENCE * seconds + seconds)


@dataclass(frozen=True, slots=True)
class Beat:
    """How far a rank has come.

    Attributes:
        number: Grows with every beat.
        step: Optimizer steps taken.
        kind: What it is doing.
        collectives: Of the head, entered so far.
        first: Whether it has taken no step since its start.
    """

    number: int
    step: int
    kind: str
    collectives: int
    first: bool

    @property
    def place(self) -> tuple[int, int]:
        """What grows as a rank goes on, and is equal where ranks wait for one another."""
        return self.step, self.collectives

    @property
    def patience(self) -> float:
        """How much longer than a sign of life its next progress may take."""
        if self.kind == OUTSIDE:
            return math.inf
        return _PROGRESS if self.kind in _WITHIN_STEPS and not self.first else _PATIENCE


@dataclass(slots=True)
class Sight:
    """The last beat of a rank, and when this rank saw it change; seconds of its own clock."""

    beat: Beat
    alive: float
    moved: float

    def update(self, beat: Beat, now: float) -> None:
        """Take a newer look."""
        if beat.number != self.beat.number:
            self.alive = now
        if (beat.place, beat.kind) != (self.beat.place, self.beat.kind):
            self.moved = now
        self.beat = beat


def verdict(seen: Mapping[int, Sight], now: float, seconds: float) -> tuple[list[int], str] | None:
    """Return the ranks that hold up the others and a sentence about them, or ``None`` if none does.

    Args:
        seen: Every rank that has not said that it is leaving.
        now: On the clock of ``seen``.
        seconds: How long a rank may be silent.
    """
    silent = [rank for rank, one in seen.items() if now - one.alive > seconds]
    if silent:
        last = seen[silent[0]]
        return silent, (
            f"{names_of(silent)} gave no sign of life for {now - last.alive:.0f} s; when last "
            f"heard of it was at step {last.beat.step} ({last.beat.kind})"
        )
    if not seen:
        return None
    least = min(one.beat.place for one in seen.values())
    behind = [rank for rank, one in seen.items() if one.beat.place == least]
    patience = max(seen[rank].beat.patience for rank in behind)
    still = min(now - one.moved for one in seen.values())
    if still <= seconds * patience:
        return None
    last = seen[behind[0]]
    where = f"at step {last.beat.step} ({last.beat.kind})"
    if len(behind) == len(seen):
        return behind, (
            f"{names_of(behind)} stand {where} for {still:.0f} s and none is behind the others: a "
            "collective does not return"
        )
    return behind, f"{names_of(behind)} holds up the others {where} for {still:.0f} s"
