"""Checksums of the pieces of a file: made while it is written, compared by threads and ranks.

A checksum of a whole file takes one thread from its first byte to its last, and every byte for any
of them. Pieces are compared in any order, by as many threads and ranks as there are, and each
reader needs those that it reads.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.checkpoint.disk import Bytes
from partialfc.errors import DamagedError
from partialfc.writing import opened

PIECE = 64 << 20
"""Bytes of a piece in what is written; a multiple of 8, so that no element lies in two."""
THREADS = 4
"""That compute checksums of one file, or read it."""
_LONGEST_PIECE = 1 << 30
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Note:
    """What a file was when it was written.

    Attributes:
        bytes: Of the file.
        piece: Bytes of every piece but the last, which is shorter; ``bytes`` where the checksum is
            of the whole file.
        sha256: Of each piece, hexadecimal.
        tensors: Names of those in the file; ``None`` where they are not noted.
    """

    bytes: int
    piece: int
    sha256: tuple[str, ...]
    tensors: tuple[str, ...] | None = None

    @classmethod
    def of(cls, found: Any) -> "Note":
        """Return the note that JSON values are; ``sha256`` may be that of a whole file.

        Raises:
            ValueError: If they are none, or do not agree with one another.
        """
        if not isinstance(found, Mapping):
            raise ValueError(f"{found!r:.50}, must be an object")
        size, sums, tensors = (found.get(key) for key in ("bytes", "sha256", "tensors"))
        piece = found.get("piece")
        if type(size) is not int or not 0 <= size < 2**63:
            raise ValueError(f"bytes is {size!r:.50}, must be a count")
        if isinstance(sums, str):
            piece, sums = size, [sums] * (size > 0)
        elif type(piece) is not int or not (0 < piece <= _LONGEST_PIECE and piece % 8 == 0):
            raise ValueError(f"piece is {piece!r:.50}, must be a multiple of 8, at most 1 GiB")
        if not isinstance(sums, list) or not all(isinstance(one, str) for one in sums):
            raise ValueError(f"sha256 is {sums!r:.50}, must be checksums")
        if len(sums) != -(-size // max(1, piece)):
            raise ValueError(f"sha256 is of {len(sums)} pieces, which {size:,} bytes are not")
        if tensors is not None and (
            not isinstance(tensors, list) or not all(isinstance(one, str) for one in tensors)
        ):
            raise ValueError(f"tensors is {tensors!r:.50}, must be names")
        return cls(size, piece, tuple(sums), None if tensors is None else tuple(tensors))

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`of` takes."""
        said: dict[str, Any] = {"bytes": self.bytes, "piece": self.piece, "sha256": [*self.sha256]}
        return said if self.tensors is None else {**said, "tensors": [*self.tensors]}

    @property
    def is_whole(self) -> bool:
        """Whether the one checksum is of the whole file, however long it is."""
        return self.piece == self.bytes

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first byte of a piece and the one behind its last."""
        return number * self.piece, min((number + 1) * self.piece, self.bytes)

    def compare(self, file: str, number: int, found: str) -> None:
        """Compare the checksum of a piece.

        Raises:
            DamagedError: If it is another; the message names file, offset, expected and found.
        """
        if found != self.sha256[number]:
            start, stop = self.bounds(number)
            raise DamagedError(
                f"{file} is corrupt: the SHA-256 of its bytes {start:,} to {stop:,} is "
                f"{found[:16]}..., and was {self.sha256[number][:16]:.16}... when it was written"
            )


class PieceSums:
    """Checksums of what comes in order, by threads that compute beside the caller.

    Memory that is given in is looked at later, so it must not change before :meth:`note`; a caller
    that is far ahead waits.

    Args:
        pool: Of the threads.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._bytes = pool, 0
        self._held: list[memoryview] = []
        self._under_way: deque[Future[str]] = deque()
        self._sums: list[str] = []

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while len(view):
            room = PIECE - self._bytes % PIECE
            self._held.append(view[:room])
            self._bytes += min(room, len(view))
            view = view[room:]
            if not self._bytes % PIECE:
                self._cut()

    def note(self, tensors: Iterable[str] | None = None) -> Note:
        """Return what the file is, when all has come."""
        if self._held:
            self._cut()
        while self._under_way:
            self._sums.append(self._under_way.popleft().result())
        names = None if tensors is None else tuple(sorted(tensors))
        return Note(self._bytes, PIECE, tuple(self._sums), names)

    def _cut(self) -> None:
        held, self._held = self._held, []
        self._under_way.append(self._pool.submit(_sum_of, held))
        while len(self._under_way) > THREADS:
            self._sums.append(self._under_way.popleft().result())


def compare_pieces(path: Path, note: Note, pieces: range, pool: ThreadPoolExecutor) -> None:
    """Compare some pieces of a file with its note: one open.

    Raises:
        DamagedError: If one is not as it was written, or the file cannot be read or has another
            size.
    """
    with opened_as_noted(path, note) as descriptor:
        sums = pool.map(lambda one: _sum_of_bytes(descriptor, *note.bounds(one)), pieces)
        for number, found in zip(pieces, sums, strict=True):
            note.compare(path.name, number, found)


@contextmanager
def opened_as_noted(path: Path, note: Note) -> Iterator[int]:
    """Return the descriptor of a file that has as many bytes as its note says.

    Raises:
        DamagedError: If it has others, or cannot be opened or read in the block.
    """
    try:
        descriptor = opened(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if size != note.bytes:
                raise DamagedError(f"{path.name} has {size} bytes, its note says {note.bytes}")
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DamagedError(f"{path.name}: {type(error).__name__}: {error}") from error


def _sum_of_bytes(descriptor: int, start: int, stop: int) -> str:
    """The SHA-256 of some bytes of a file, as far as it has them."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, stop - start)))
    while start < stop:
        count = os.preadv(descriptor, [block[: stop - start]], start)
        if not count:
            break
        digest.update(block[:count])
        start += count
    return digest.hexdigest()


def _sum_of(views: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()
