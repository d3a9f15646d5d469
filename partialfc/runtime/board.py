"""What the ranks tell one another of how they are, over a store that all of them reach.

A look at the board costs the same with two ranks and with thousands: two ranks, the observers, read
the beats of all, and the others theirs.

Keys: ``beat/<rank>`` how far it has come, ``news`` that there is one of ``verdict`` (who holds up
the others, from the first that found it) and ``failure`` (the first error of a rank), ``noted``
that the ledger has it, ``lookers`` and ``lost`` who was lost, ``dumped`` how many wrote stacks.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, Store

from partialfc.distributed.ranks import Ranks
from partialfc.runtime.beats import Beat

_BEATS_AT_ONCE = 2048
_LOOKERS = 4
"""So many look for a lost rank, since those that look may be lost too."""


class Verdict(NamedTuple):
    """Who holds up the others, in a sentence, and how many ranks live to write their stacks."""

    sentence: str
    living: int


class Board:
    """One rank's place at the board. All that asks raises ``RuntimeError`` where the store is gone.

    Args:
        store: That all ranks share.
        ranks: This rank among all.

    Attributes:
        observers: The ranks that watch all others: the first and the last, two hosts if there are.
        answered: When the store last gave an answer, on the monotonic clock.
    """

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self._store, self._ranks = PrefixStore("watchdog", store), ranks
        self.observers = sorted({0, ranks.size - 1})
        self.answered = time.monotonic()
        self._there: set[int] = set()

    @property
    def observes(self) -> bool:
        """Whether this rank is an observer."""
        return self._ranks.rank in self.observers

    def beat(self, beat: Beat | None) -> None:
        """Tell how far this rank has come, or that it leaves."""
        fields = astuple(beat) if beat else ()
        self._set(f"beat/{self._ranks.rank}", json.dumps(fields))

    def beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """Return the beats of those of some ranks that are there and have not left."""
        told: dict[int, Beat] = {}
        for start in range(0, len(ranks), _BEATS_AT_ONCE):
            some = self._begun(ranks[start : start + _BEATS_AT_ONCE])
            values = self._store.multi_get([f"beat/{rank}" for rank in some]) if some else []
            self.answered = time.monotonic()
            for rank, value in zip(some, values, strict=True):
                if fields := json.loads(value):
                    told[rank] = Beat(*fields)
        return told

    def news(self) -> bool:
        """Whether there is a verdict or a failure."""
        return self._has("news")

    def verdict(self) -> Verdict | None:
        """Return the one that was found first."""
        return Verdict(**found) if (found := self._get("verdict")) else None

    def pronounce(self, verdict: Verdict) -> Verdict:
        """Return the verdict for all: this one, if there is none yet."""
        self._store.compare_set("verdict", "", json.dumps(verdict._asdict()))
        self._set("news", "1")
        return self.verdict() or verdict

    def failure(self) -> dict[str, Any] | None:
        """Return the first error of a rank: ``rank``, ``step``, ``message``, ``code``."""
        failure: dict[str, Any] | None = self._get("failure")
        return failure

    def fail(self, failure: Mapping[str, Any]) -> None:
        """Tell an error of this rank, if it is the first."""
        self._store.compare_set("failure", "", json.dumps(failure))
        self._set("news", "1")

    def note(self) -> None:
        """Tell that the ledger has the failure."""
        self._set("noted", "1")

    def noted(self) -> bool:
        """Whether the ledger has the failure."""
        return self._has("noted")

    def may_look(self) -> bool:
        """Whether this rank is one of the few that look for a lost rank; asked once."""
        return int(self._store.add("lookers", 1)) <= _LOOKERS

    def found_lost(self, sentence: str) -> None:
        """Tell who was lost."""
        self._set("lost", json.dumps(sentence))

    def lost(self) -> str | None:
        """Return who was lost, in a sentence, if one that looks has found it."""
        words: str | None = self._get("lost")
        return words

    def dump(self) -> None:
        """Tell that this rank has written its stacks."""
        self._store.add("dumped", 1)

    def dumped(self) -> int:
        """How many ranks have written their stacks."""
        return int(self._store.add("dumped", 0))

    def _begun(self, ranks: Sequence[int]) -> list[int]:
        """Those that have told a beat ever: to ask for the others would wait for them."""
        if missing := [rank for rank in ranks if rank not in self._there]:
            all_there = self._store.check([f"beat/{rank}" for rank in missing])
            self._there.update(
                missing if all_there else filter(lambda r: self._has(f"beat/{r}"), missing)
            )
        return [rank for rank in ranks if rank in self._there]

    def _set(self, name: str, value: str) -> None:
        self._store.set(name, value)
        self.answered = time.monotonic()

    def _has(self, name: str) -> bool:
        found = bool(self._store.check([name]))
        self.answered = time.monotonic()
        return found

    def _get(self, name: str) -> Any:
        return json.loads(self._store.get(name)) if self._has(name) else None
