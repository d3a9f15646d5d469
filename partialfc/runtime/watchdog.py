"""Knows where every rank is, and ends a run that cannot go on: names the cause, in bounded time.

A thread of each rank tells a store, every second or two, how far its rank has come. When a rank no
longer moves, the ranks that live see who it is, write the Python stacks of all their threads, and
exit. Nothing of it needs the main thread, which may be waiting in a collective for ever. Whatever
is written on the way out may fail or hang, as a full disk and a pipe that nobody reads do: a second
thread, the guard, writes nothing and ends the process when its time is over.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch.distributed as dist
from torch.distributed import Store

from partialfc.distributed import ranks as collectives
from partialfc.distributed.ranks import Ranks
from partialfc.errors import HangError, LostRankError, exit_code_of, record_for_torchrun
from partialfc.records.ledger import Ledger
from partialfc.runtime import preemption
from partialfc.runtime.beats import OUTSIDE, Beat, Sight, verdict
from partialfc.runtime.board import Board, Verdict
from partialfc.words import names_of
from partialfc.writing import opened

_SECONDS_TO_LEAVE = 15.0
_SECONDS_TO_DUMP = 10.0
_SECONDS_TO_SAVE = 600.0


class Pending(Protocol):
    """Something that writes behind the training."""

    @property
    def pending(self) -> bool:
        """Whether it is not done."""


class Watchdog:
    """Watches this rank and the others from a thread; starts when it is made.

    Args:
        ranks: This rank among all.
        folder: The run's folder; stacks go there.
        seconds: How long a rank may be silent.
        store: Where the ranks tell their beats; ``None`` for one rank.
    """

    def __init__(self, ranks: Ranks, folder: Path, seconds: float, store: Store | None) -> None:
        self._ranks, self._folder, self._seconds = ranks, folder, seconds
        self._board = None if store is None else Board(store, ranks)
        self.interval = min(2.0, seconds / 6)
        self._stderr = _never_waiting_stderr()
        self._ledger: Ledger | None = None
        self._saver: Pending | None = None
        self._number = 0
        self._seen: dict[int, Sight] = {}
        self._answered = time.monotonic()
        self._failed: float | None = None
        self._leaving, self._telling = False, threading.Lock()
        self._ended = threading.Event()
        self._leave_by: tuple[float, int] | None = None
        self._guard = threading.Thread(target=self._watch_the_watch, name="guard", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._guard.start()
        self._thread.start()

    def follow(self, ledger: Ledger, saver: Pending | None = None) -> None:
        """Learn from the ledger how far this rank has come, and from a saver what to wait for."""
        self._ledger, self._saver = ledger, saver

    def explain(self, error: BaseException) -> BaseException:
        """Return what to tell of an error that ends this rank, and tell the other ranks.

        If it is only that another rank is gone, the answer names that rank. Takes up to a few
        beats. From here on the process has ``15 s`` to leave by itself.
        """
        if self._board is not None and _is_lost(error):
            error = LostRankError(f"{self._culprit(self._board)} ({str(error).splitlines()[0]})")
        elif self._board is not None:
            self._tell_failure(self._board, error)
        self._leave_by = (time.monotonic() + _SECONDS_TO_LEAVE, exit_code_of(error))
        return error

    def close(self) -> None:
        """Say that this rank leaves, and stop watching."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * self.interval + 1)
        faulthandler.cancel_dump_traceback_later()
        self._say_goodbye()

    def _watch_the_watch(self) -> None:
        """The guard: what the watchdog waits for may never come.

        A store behind a cut link refuses nothing, and whoever asks it waits for ever. Several looks
        in a row, so that a process that was stopped and goes on is not taken for it.
        """
        looks = 0
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            silence = now - self._last_answer()
            looks = looks + 1 if silence > self._seconds else 0
            if self._leave_by is not None and (looks > 3 or now > self._leave_by[0]):
                os._exit(self._leave_by[1])
            if looks > 3:
                self._leave_by = (now + _SECONDS_TO_LEAVE, LostRankError.exit_code)
                words = silence, "and no error"
                threading.Thread(target=self._no_answer, args=words, daemon=True).start()

    def _watch(self) -> None:
        now = time.monotonic()
        while True:  # the first beat at once: who is killed before the second was there, too
            self._arm()
            before, now = now, time.monotonic()
            if now - before > self._seconds:  # this process was stopped: nothing was seen meanwhile
                self._seen, self._answered = {}, now
            try:
                self._beat()
                if self._board is None:
                    self._look({self._ranks.rank: self._own()}, now)
                else:
                    self._look_around(self._board, now)
                self._answered = now
            except Exception as error:  # whatever it is, a hang must still find its end
                silent = time.monotonic() - self._last_answer()
                if silent > self._seconds:
                    problem = (str(error) or type(error).__name__).splitlines()[0]
                    self._no_answer(silent, problem)
            if self._ended.wait(self.interval):
                return

    def _last_answer(self) -> float:
        """A store that answers is not lost, however slow it is."""
        return max(self._answered, self._board.answered if self._board else self._answered)

    def _no_answer(self, seconds: float, problem: str) -> NoReturn:
        self._leave_by = (time.monotonic() + _SECONDS_TO_LEAVE, LostRankError.exit_code)
        error = LostRankError(
            "the store of the ranks, on the host of rank 0, gives no answer for "
            f"{seconds:.0f} s ({problem}). Stacks of this rank: {self._dump()}"
        )
        self._stop(error)

    def _arm(self) -> None:
        """If this thread cannot run, because something keeps Python's lock, C still shows where."""
        with suppress(OSError, ValueError, RuntimeError):  # stderr is closed
            if self._stderr is not None:
                faulthandler.dump_traceback_later(self._seconds, file=self._stderr)

    def _own(self) -> Beat:
        if self._ledger is None:
            return Beat(self._number, 0, OUTSIDE, 0, True)
        step, kind = self._ledger.step, self._ledger.kind
        return Beat(self._number, step, kind, collectives.entered(), step == self._ledger.first)

    def _beat(self) -> None:
        self._number += 1
        with self._telling:
            if self._board is not None and not self._leaving:
                self._board.beat(self._own())

    def _look_around(self, board: Board, now: float) -> None:
        """Read what others have found; look at beats while this rank itself stands still."""
        if board.news():
            if found := board.verdict():
                self._hang(board, found)
            self._heed(board.failure(), now)
        own = self._seen.setdefault(self._ranks.rank, Sight(self._own(), now, now))
        own.update(self._own(), now)
        if now - own.moved <= 2 * self.interval:
            self._seen = {self._ranks.rank: own}
            return
        watched = {self._ranks.rank, *board.observers}
        if not board.observes:
            self._sight(board.beats(sorted(watched)), now, among=watched)
        if board.observes or self._nobody_observes(board, now):
            self._look(board.beats(range(self._ranks.size)), now)

    def _heed(self, failure: Mapping[str, Any] | None, now: float) -> None:
        """Wait for a rank that fails to end the others, and leave if it does not."""
        if failure is None or failure["rank"] == self._ranks.rank or self._leave_by is not None:
            return
        self._note(failure)
        saving = self._saver is not None and self._saver.pending
        wait = _SECONDS_TO_SAVE if saving else _SECONDS_TO_LEAVE
        self._failed = self._failed or now
        if now - self._failed > wait:
            self._stop(LostRankError(_of(failure)))

    def _nobody_observes(self, board: Board, now: float) -> bool:
        seen = [self._seen[rank] for rank in board.observers if rank in self._seen]
        return all(now - one.alive > self._seconds for one in seen)

    def _sight(self, beats: Mapping[int, Beat], now: float, *, among: Collection[int]) -> None:
        """Take a newer look at some ranks; those that are not there have left."""
        for rank, beat in beats.items():
            self._seen.setdefault(rank, Sight(beat, now, now)).update(beat, now)
        for rank in self._seen.keys() & set(among) - beats.keys():
            del self._seen[rank]

    def _look(self, beats: Mapping[int, Beat], now: float) -> None:
        self._sight(beats, now, among=self._seen.keys())
        patience = self._seconds
        if preemption.received(signal.SIGTERM):  # who sent it kills before long
            patience = min(patience, _SECONDS_TO_LEAVE)
        found = verdict(self._seen, now, patience)
        if found is None:
            return
        living = sum(now - one.alive < 3 * self.interval for one in self._seen.values())
        pronounced = Verdict(found[1], living)
        self._hang(self._board, self._board.pronounce(pronounced) if self._board else pronounced)

    def _say_goodbye(self) -> None:
        """Nobody waits for this rank any more."""
        with self._telling:
            self._leaving = True
            if self._board is not None:
                with suppress(RuntimeError):  # to ask it fails too, and that is looked at
                    self._board.beat(None)

    def _culprit(self, board: Board) -> str:
        """Who was lost: the rank that told why, or the one whose beats end.

        A few ranks look at the beats of all, and the others wait for what they find.
        """
        self._say_goodbye()
        everyone = range(self._ranks.size)
        try:
            first = board.beats(everyone) if board.may_look() else None
            until = time.monotonic() + (3 if first is None else 2) * self.interval
            while True:
                if failure := board.failure():
                    return _of(failure)
                if lost := board.lost():
                    return lost
                if time.monotonic() > until or preemption.received(signal.SIGTERM):
                    break
                time.sleep(self.interval / 4)
            if first is not None and not preemption.received(signal.SIGTERM):
                now = board.beats(everyone)
                if silent := [rank for rank, beat in first.items() if now.get(rank) == beat]:
                    beat = first[silent[0]]
                    words = f"{names_of(silent)} was lost at step {beat.step} ({beat.kind})"
                    board.found_lost(words)
                    return words
        except RuntimeError:
            return "the host of rank 0 was lost, and the store of the ranks with it"
        return "a rank was lost; the log of its host says which"

    def _tell_failure(self, board: Board, error: BaseException) -> None:
        failure = {
            "rank": self._ranks.rank,
            "step": self._own().step,
            "message": f"{type(error).__name__}: {error}",
            "code": exit_code_of(error),
        }
        with suppress(RuntimeError):
            board.fail(failure)
            if self._ranks.rank == 0:  # its ledger has the error
                board.note()
            deadline = time.monotonic() + 2 * self.interval + 1
            while time.monotonic() < deadline and not board.noted():
                time.sleep(self.interval / 4)

    def _note(self, failure: Mapping[str, Any]) -> None:
        """Write another rank's error to the ledger: torchrun kills rank 0 when that one leaves."""
        if self._ranks.rank == 0 and self._failed is None:
            if self._ledger is not None:
                self._ledger.end(f"rank {failure['rank']}: {failure['message']}", failure["code"])
            if self._board is not None:
                self._board.note()

    def _hang(self, board: Board | None, found: Verdict) -> NoReturn:
        """Write the stacks and leave."""
        self._leave_by = (time.monotonic() + _SECONDS_TO_LEAVE, HangError.exit_code)
        folder = self._dump().parent
        error = HangError(f"{found.sentence}. The stacks of the ranks that live are in {folder}")
        self._stop(error, lambda: self._wait_for_dumps(board, found.living))

    def _dump(self) -> Path:
        """Write the stacks of all threads to the run's folder, or where that fails, to stderr."""
        folder = self._folder / "stacks" / f"step_{self._own().step:08d}"
        path = folder / f"rank_{self._ranks.rank:05d}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            with suppress(OSError, ValueError, RuntimeError):
                if self._stderr is not None:
                    faulthandler.dump_traceback(self._stderr)
        return path

    def _wait_for_dumps(self, board: Board | None, living: int) -> None:
        """The first rank to leave makes torchrun end the others: wait until they are ready."""
        if board is None:
            return
        board.dump()
        deadline = time.monotonic() + _SECONDS_TO_DUMP
        while time.monotonic() < deadline and board.dumped() < living:
            time.sleep(self.interval / 2)

    def _stop(
        self, error: HangError | LostRankError, before: Callable[[], None] = lambda: None
    ) -> NoReturn:
        """Say why, and leave without the main thread, which may never come back.

        What is written may fail, and then the rest is written all the same; or hang, and then the
        guard leaves.
        """
        self._leave_by = (time.monotonic() + _SECONDS_TO_LEAVE, error.exit_code)
        with suppress(Exception):
            record_for_torchrun(error)
        with suppress(Exception):
            if self._ledger is not None:
                self._ledger.end(f"{type(error).__name__}: {error}", error.exit_code)
        with suppress(Exception):
            print(f"rank {self._ranks.rank}: {error}", file=sys.stderr, flush=True)
        with suppress(Exception):
            before()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(error.exit_code)


def _never_waiting_stderr() -> int | None:
    """Standard error, opened anew: a stack that a full pipe does not take must not stop Python."""
    try:
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a socket, another system, or it is closed
        try:
            return None if sys.__stderr__ is None else sys.__stderr__.fileno()
        except (OSError, ValueError):
            return None


def _of(failure: Mapping[str, Any]) -> str:
    return f"rank {failure['rank']} failed first, at step {failure['step']}: {failure['message']}"


def _is_lost(error: BaseException) -> bool:
    """Whether an error says that a collective found another rank gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
