"""Ranges of far shards that are asked for before they are needed, many at a time.

Shape suffixes: B = images asked for, K = stretches of neighbouring images, I = their images.
"""

import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from partialfc.data.tars.index import TarIndex
from partialfc.data.tars.store import ShardError, Store

IN_FLIGHT = 64
"""Requests at a time, of one process."""
ANSWER = 120.0
"""Seconds in which a range must have come; then it is asked for once more."""

KEPT = 32
"""Calls after which what none of them named is let go: a batch makes two."""

_GAP = 1 << 17  # bytes that cost no more than another request: 64 at a time, 20 ms, 400 MB/s
_LONGEST = 1 << 23


_Jobs: TypeAlias = "queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]] | None]"


def images_kept(batch: int, block: int | None, window: int) -> int:
    """Return how many images a rank keeps at most: those asked for, and those of past batches.

    Args:
        batch: Images of a rank's batch.
        block: ``data.block``.
        window: ``data.block_window``; the window that is read, the next and the one before it.
    """
    return KEPT * batch if block is None else 3 * block * window


class Piece(NamedTuple):
    """Some images that lie near each other, [first, stop), in one request."""

    first: int
    stop: int
    shard: int
    start: int
    end: int


class Ahead:
    """What was asked for and is kept as long as batches that come soon may need it.

    Args:
        store: Where the shards are.
        index: Their images.
    """

    def __init__(self, store: Store, index: TarIndex) -> None:
        self._store, self._index = store, index
        self._asked: OrderedDict[int, tuple[int, list[tuple[Piece, Future[bytes]]]]] = OrderedDict()
        self._calls, self._stretch = 0, 1
        self._lock = threading.Lock()
        self._pool = _Threads()

    def begin(self, image_B: NDArray[np.int64], stretch: int) -> None:
        """Ask for the stretches that images [B] are in, but for those that are under way.

        Args:
            image_B: Images that will be needed.
            stretch: Neighbouring images that come together.
        """
        with self._lock:
            if stretch != self._stretch:
                self._asked.clear()
                self._stretch = stretch
            self._calls += 1
            new_K = []
            for key in np.unique(image_B // stretch).tolist():
                if key in self._asked:
                    self._asked[key] = (self._calls, self._asked[key][1])
                    self._asked.move_to_end(key)
                else:
                    new_K.append(key)
            for piece in self._pieces(np.asarray(new_K, np.int64)):
                entry = (piece, self._pool.submit(self._reader(piece)))
                for key in range(piece.first // stretch, (piece.stop - 1) // stretch + 1):
                    self._asked.setdefault(key, (self._calls, []))[1].append(entry)
            while self._asked and next(iter(self._asked.values()))[0] <= self._calls - KEPT:
                self._asked.popitem(last=False)

    def bytes_of(self, image: int) -> memoryview | None:
        """Return an image with its header, where it was asked for; ``None`` if it was not.

        Raises:
            ShardError: If it cannot be had.
        """
        with self._lock:
            _, entries = self._asked.get(image // self._stretch, (0, []))
        for piece, future in entries:
            if piece.first <= image < piece.stop:
                start, end = self._index.extent(image)
                return memoryview(self._answer(piece, future))[
                    start - piece.start : end - piece.start
                ]
        return None

    def _answer(self, piece: Piece, future: "Future[bytes]") -> bytes:
        try:
            return future.result(ANSWER)
        except TimeoutError:
            pass
        try:
            return self._pool.submit(self._reader(piece)).result(ANSWER)
        except TimeoutError:
            raise ShardError(
                f"{self._index.shards[piece.shard]}: no answer in 2 x {ANSWER:.0f} s to a request "
                f"for bytes {piece.start} to {piece.end}."
            ) from None

    def _reader(self, piece: Piece) -> Callable[[], bytes]:
        shard = self._index.shards[piece.shard]
        return lambda: self._store.read(shard, piece.start, piece.end)

    def _pieces(self, key_K: NDArray[np.int64]) -> list[Piece]:
        """Ranges of shards that hold stretches [K] in ascending order; near ones are one."""
        if not len(key_K):
            return []
        image_I = (key_K[:, None] * self._stretch + np.arange(self._stretch)).ravel()
        image_I = image_I[image_I < len(self._index)]
        shard_I, start_I, end_I = self._index.extents(image_I)
        apart_I = np.ones(len(image_I) + 1, np.bool_)
        gap_I = start_I[1:] - end_I[:-1]
        apart_I[1:-1] = (
            (shard_I[1:] != shard_I[:-1])
            | (gap_I > _GAP)
            | (start_I[1:] // _LONGEST != start_I[:-1] // _LONGEST)
        )
        edges = np.flatnonzero(apart_I).tolist()
        return [
            Piece(
                int(image_I[first]), int(image_I[stop - 1]) + 1,
                int(shard_I[first]), int(start_I[first]), int(end_I[stop - 1]),
            )
            for first, stop in pairwise(edges)
        ]  # fmt: skip


class _Threads:
    """Threads that wait for stores; a process ends without waiting for them."""

    def __init__(self) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        self._started = 0
        weakref.finalize(self, _end, self._jobs)

    def submit(self, job: Callable[[], bytes]) -> "Future[bytes]":
        future: Future[bytes] = Future()
        self._jobs.put((future, job))
        if self._started < IN_FLIGHT:
            self._started += 1
            threading.Thread(target=_work, args=(self._jobs,), name="range", daemon=True).start()
        return future


def _end(jobs: _Jobs) -> None:
    for _ in range(IN_FLIGHT):
        jobs.put(None)


def _work(jobs: _Jobs) -> None:
    while (found := jobs.get()) is not None:
        future, job = found
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del found, future, job  # what was read is its reader's
