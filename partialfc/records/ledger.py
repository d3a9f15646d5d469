"""Where the time of a run goes, over all its starts: ``ledger.jsonl`` in its folder.

Rank 0 appends a JSON object per line; one that is damaged or cut short is left out when it is read.
``time`` is in Unix seconds, ``seconds`` are those of this start so far, by kind:

    {"event": "start", "time": .., "step": 0, "seconds": {..}, "began": .., "ranks": 8, ..}
    {"event": "spent", "time": .., "step": 120, "seconds": {"startup": 9.1, "train": 61.0, ..}}
    {"event": "end", "time": .., "step": 200, "seconds": {..}, "cause": "done", "code": 0}

:func:`goodput` turns them into seconds by kind that add up to the wall time of the run.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from partialfc.errors import exit_code_of
from partialfc.records.lines import Lines, is_number, is_step, read_lines
from partialfc.records.unessential import unessential

KINDS = {
    "train": "Steps that count: forward, backward, update",
    "startup": "From the start of the launcher to the first step",
    "restore": "Finding, verifying and loading a checkpoint",
    "data": "Steps that count, waiting for their batch",
    "save": "Training stood still for a checkpoint",
    "wasted": "Steps that were done again because a fault came before the next checkpoint",
    "recovery": "From the last sign of life of a start to the next start",
    "other": "Verification, pictures, reports",
}
"""What the wall time of a run is spent on; ``train`` over all of them is the goodput."""

_SECONDS_BETWEEN_LINES = 5.0
_STOPPED = (0, 75, 130)
"""Exit codes of a start that was done, preempted or stopped by somebody: no fault.

SIGTERM before the first step, 143, may be either: torchrun sends it to all ranks when another one
died. An ``end`` that knows better says ``"asked": true``.
"""
_LAST = 2**63
EVENTS = (b'"event": "start"', b'"event": "end"')
"""What is read of a ledger of months, each with the last sign of life before it."""


Entry = Mapping[str, Any]


class Ledger:
    """The time of one start, charged to one kind at a time; appended to the run's ledger.

    Args:
        path: ``ledger.jsonl``, or ``None`` on a rank that writes nothing.
        ranks: World size.
        settings: Hash of the settings that this start was given.

    Attributes:
        kind: What time is charged to now.
        step: Steps that are done.
        first: The step that this start went on from, once it is known.
        before: Entries of earlier starts, on the rank that writes.
    """

    def __init__(self, path: Path | None, *, ranks: int = 1, settings: str = "") -> None:
        self._began = process_began()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._seconds["startup"] = time.time() - self._began
        self.kind, self._since = "startup", time.monotonic()
        self.step, self._written = 0, -_SECONDS_BETWEEN_LINES
        self.first: int | None = None
        self._lines: Lines | None = None
        self.before: list[dict[str, Any]] = []
        self._past: dict[str, float] | None = None
        if path is not None:
            with unessential(path):
                self.before, damaged = read_lines(path, is_sound, EVENTS)
                if damaged:
                    print(f"{path}: {damaged} damaged lines are left out.", file=sys.stderr)
            self._lines = Lines(path, EVENTS)
            self._append("start", began=self._began, ranks=ranks, settings=settings)

    def switch(self, kind: str) -> None:
        """Charge the time from now on to another of :data:`KINDS`."""
        now = time.monotonic()
        self._seconds[self.kind] += now - self._since
        self.kind, self._since = kind, now

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Charge the time inside to ``kind``, and what follows to what was before."""
        outer = self.kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(outer)

    def spent(self) -> dict[str, float]:
        """Seconds of this start by kind until now."""
        self.switch(self.kind)
        return dict(self._seconds)

    def at(self, step: int, *, now: bool = False) -> None:
        """Note that ``step`` steps are done; written every few seconds, or ``now``.

        A checkpoint's step is written ``now``: if a fault sends the run back to it, what came
        after is known to have been in vain.
        """
        self.step = step
        self.first = step if self.first is None else self.first
        if now or time.monotonic() - self._written >= _SECONDS_BETWEEN_LINES:
            self._append("spent")

    def end(self, cause: str, code: int, *, asked: bool = False) -> None:
        """Note why this start ended, unless that is noted. A start without an end was killed.

        Args:
            cause: In words.
            code: Exit code of the process.
            asked: Whether somebody asked for it; ``code`` alone may not tell.
        """
        self._append("end", cause=cause, code=code, **({"asked": True} if asked else {}))
        if self._lines is not None:
            self._lines.close()

    def totals(self) -> dict[str, float]:
        """Seconds by kind of the whole run until now, ``wall`` and ``goodput`` with them.

        It is known after the first :meth:`at` what earlier starts did in vain.
        """
        self.switch(self.kind)
        if self._past is None:
            now = {"time": time.time(), "step": self.step, "seconds": dict(self._seconds)}
            start = {**now, "event": "start", "step": 0, "began": self._began}
            sums = goodput([*self.before, start, {**now, "event": "spent"}])
            self._past = {kind: sums[kind] - self._seconds[kind] for kind in KINDS}
        return _with_sums({kind: self._past[kind] + self._seconds[kind] for kind in KINDS})

    def _append(self, event: str, **more: Any) -> None:
        self.switch(self.kind)
        self._written = time.monotonic()
        entry: dict[str, Any] = {"event": event, "time": time.time(), "step": self.step, **more}
        entry["seconds"] = {kind: round(value, 4) for kind, value in self._seconds.items()}
        if self._lines is not None:
            self._lines.append(json.dumps(entry))


@contextmanager
def keeping(path: Path | None, *, ranks: int, settings: str) -> Iterator[Ledger]:
    """Keep the ledger of one start, and note at its end what ended it."""
    ledger = Ledger(path, ranks=ranks, settings=settings)
    try:
        yield ledger
    except KeyboardInterrupt as error:
        asked = getattr(error, "asked", True)
        ledger.end(str(error) or "stopped", exit_code_of(error), asked=asked)
        raise
    except BaseException as error:
        ledger.end(f"{type(error).__name__}: {error}", exit_code_of(error))
        raise
    else:
        ledger.end("done", 0)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a ledger; lines that are damaged or cut short are left out."""
    return read_lines(path, is_sound, EVENTS)[0]


def is_sound(entry: dict[str, Any]) -> bool:
    """Whether a line of a ledger is one, with all that its event has."""
    seconds = entry.get("seconds")
    return (
        isinstance(seconds, dict)
        and seconds.keys() <= KINDS.keys()
        and all(is_number(value) for value in seconds.values())
        and is_number(entry.get("time"))
        and is_step(entry.get("step"))
        and _has_its_own(entry)
    )


def _has_its_own(entry: dict[str, Any]) -> bool:
    match entry.get("event"):
        case "start":
            return is_number(entry.get("began"))
        case "end":
            return isinstance(entry.get("cause"), str) and is_step(entry.get("code"))
        case event:
            return event == "spent"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run, from its entries.

    Attributes:
        entries: All of them, the ``start`` first.
        end: Its ``end``, or ``None`` if it was killed or still runs.
    """

    entries: list[Entry]
    end: Entry | None

    @property
    def reached(self) -> int:
        """The last step that it noted."""
        return int(max(entry["step"] for entry in self.entries))

    @property
    def resumed_at(self) -> int | None:
        """The step that it went on from; ``None`` if it never got that far."""
        later = [entry["step"] for entry in self.entries if entry["event"] != "start"]
        return int(later[0]) if later else None


def starts(entries: Sequence[Entry]) -> list[Start]:
    """Return the starts of a run, oldest first."""
    groups: list[list[Entry]] = []
    for entry in entries:
        if entry["event"] == "start":
            groups.append([])
        if groups:
            groups[-1].append(entry)
    return [
        Start(group, next((entry for entry in group if entry["event"] == "end"), None))
        for group in groups
    ]


def was_stopped(end: Entry) -> bool:
    """Whether an ``end`` is of a start that was done, preempted or stopped by somebody."""
    return end["code"] in _STOPPED or end.get("asked") is True


def fault_codes(entries: Sequence[Entry]) -> list[str]:
    """Return the exit codes of the starts that ended in a fault; "killed" for one without an end.

    The last start counts as one of them if it has no end: it must be known to be over.
    """
    ends = [start.end for start in starts(entries)]
    return [
        "killed" if end is None else str(end["code"])
        for end in ends
        if end is None or not was_stopped(end)
    ]


def goodput(entries: Sequence[Entry]) -> dict[str, float]:
    """Return seconds by kind, their sum ``wall``, and ``goodput``, the share of ``train`` in it.

    A start that goes on at an earlier step than those before had reached makes their time since
    that step ``wasted``. Time between two starts is ``recovery``; where the first of them was done
    or was stopped by somebody, it is not time of the run.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    every = starts(entries)
    resumed = [_LAST if (at := start.resumed_at) is None else at for start in every]
    later = list(accumulate([_LAST, *reversed(resumed)], min))  # the least of those after each
    for start, least in zip(every, reversed(later[:-1]), strict=True):
        counted = [entry for entry in start.entries if entry["step"] <= least]
        kept = counted[-1]["seconds"] if counted else {}
        for kind, value in kept.items():
            seconds[kind] += value
        seconds["wasted"] += sum(start.entries[-1]["seconds"].values()) - sum(kept.values())
    for one, other in pairwise(every):
        if one.end is None or not was_stopped(one.end):
            gap = other.entries[0]["began"] - one.entries[-1]["time"]
            seconds["recovery"] += max(0.0, gap)
    return _with_sums(seconds)


def _with_sums(seconds: Mapping[str, float]) -> dict[str, float]:
    wall = sum(seconds.values())
    return {**seconds, "wall": wall, "goodput": seconds["train"] / wall if wall else 0.0}


def fruitless(entries: Sequence[Entry], settings: str) -> list[Start]:
    """Return the last starts in a row that ended in a fault before they came to a new step.

    A new step is one that no start before had come to. Starts with other settings do not count,
    and neither does what was before one that somebody stopped.
    """
    in_a_row: list[Start] = []
    furthest = 0
    for start in starts(entries):
        stopped = start.end is not None and was_stopped(start.end)
        if stopped or start.reached > furthest or start.entries[0].get("settings") != settings:
            in_a_row = []
        else:
            in_a_row.append(start)
        furthest = max(furthest, start.reached)
    return in_a_row


def process_began() -> float:
    """Return when this process, or the torchrun that first started it, began; Unix seconds."""
    own = os.getpid()
    first = "TORCHELASTIC_RUN_ID" in os.environ and _restarts() == 0
    return _began(os.getppid() if first else own) or _began(own) or time.time()


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _began(process: int) -> float | None:
    """Linux tells when a process began, in clock ticks since the machine did."""
    try:
        fields = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - max(0.0, age)
