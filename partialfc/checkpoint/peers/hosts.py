"""Which ranks share a host, which start a run is at, and who keeps whose part."""

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partialfc.checkpoint.peers.memory import is_token
from partialfc.runtime.place import own_place
from partialfc.writing import read_text, write_json

_LONGEST = 1 << 16


def host_number() -> int:
    """Return the number of this rank's host: of its torchrun, or counted by the ranks of one."""
    place, group = own_place(), os.environ.get("GROUP_RANK", "")
    return int(group) if group.isdecimal() else place.rank // place.local_size


def keepers(hosts: Sequence[int]) -> list[int] | None:
    """Return for each rank the rank that keeps its part: of another host, and each keeps one.

    Ranks of a host follow one another in a ring, in which a part goes as far as the largest host is
    long. ``None`` where that leads some back to their own host: there is one host, or it has more
    ranks than all others.

    Args:
        hosts: The host of each rank.
    """
    ring = sorted(range(len(hosts)), key=lambda rank: (hosts[rank], rank))
    most = max(map(hosts.count, {*hosts}))
    found = [0] * len(ring)
    for at, rank in enumerate(ring):
        found[rank] = ring[(at + most) % len(ring)]
    apart = all(hosts[rank] != hosts[keeper] for rank, keeper in enumerate(found))
    return found if apart else None


@dataclass(frozen=True, slots=True)
class Line:
    """Which copies a start may go on from: ``peers.json`` in the run's folder.

    A copy of another run, of a start that a later one has left behind, or of a folder that was
    emptied since is none of these.

    Attributes:
        run: Names the run, 32 hexadecimal digits.
        start: The last start that has come to its first step.
        before: The start and the step of the copies that it went on from, if it did.
    """

    run: str
    start: str
    before: tuple[str, int] | None = None

    @classmethod
    def new(cls) -> "Line":
        """The line of a run that has made no copy."""
        return cls(secrets.token_hex(16), secrets.token_hex(16))

    def next(self, before: tuple[str, int] | None) -> "Line":
        """The line once a new start has gone on from copies, or from none."""
        return Line(self.run, secrets.token_hex(16), before)

    @classmethod
    def read(cls, path: Path) -> "Line | None":
        """Return what a start wrote; ``None`` where there is nothing, or nothing sound."""
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls.of(json.loads(read_text(path, most=_LONGEST)))
        return None

    @classmethod
    def of(cls, found: Any) -> "Line":
        """Return the line that JSON values are.

        Raises:
            ValueError, TypeError, KeyError: If they are none.
        """
        run, start, before = found["run"], found["start"], found["before"]
        if before is not None:
            token, step = before
            if not is_token(token) or type(step) is not int:
                raise ValueError("before")
            before = token, step
        if not is_token(run) or not is_token(start):
            raise ValueError("run or start")
        return cls(run, start, before)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_json(path, asdict(self))

    def accepts(self, start: str, step: int) -> bool:
        """Whether copies of a start and a step may be gone on from."""
        return start == self.start or (start, step) == self.before

    @property
    def starts(self) -> list[str]:
        """Starts of copies that may be gone on from, the later first."""
        return [self.start, *([self.before[0]] if self.before else [])]
