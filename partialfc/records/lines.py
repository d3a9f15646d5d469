"""Files of JSON objects, one a line, that grow: a lost or damaged line costs itself alone."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from partialfc.records import parts
from partialfc.records.parts import LONGEST_LINE, Words, lines_in, some_lines
from partialfc.records.unessential import unessential
from partialfc.writing import opened

_BLOCK = 1 << 16
_SECONDS_TO_WAIT = 5.0


class Lines:
    """Appends to a file, which is made with the first line; any thread may.

    A line that cannot be written is lost (:mod:`partialfc.records.unessential`). What a kill or a
    full disk left of one is ended before the next, so that no two become one.

    Args:
        path: Of the file.
        always: Given, the file is kept in parts (:mod:`partialfc.records.parts`), of which lines
            with these words are always read.
    """

    def __init__(self, path: Path, always: Words | None = None) -> None:
        self._path, self._file, self._always = path, -1, always
        self._closed = False
        self._size, self._most = 0, parts.PART_BYTES
        self._writing = threading.Lock()

    def append(self, line: str) -> None:
        """Write one line, without its end."""
        with unessential(self._path):
            if not self._writing.acquire(timeout=_SECONDS_TO_WAIT):
                raise TimeoutError(errno.ETIMEDOUT, "another line has not come to its end")
            try:
                if not self._closed:
                    self._write(line)
                    if self._always is not None and self._size >= self._most:
                        self._split(self._always)
            finally:
                self._writing.release()

    def _write(self, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            if self._file < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = opened(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
                size = self._size = os.fstat(self._file).st_size
                if size and os.pread(self._file, 1, size - 1) != b"\n":
                    data = b"\n" + data
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(data)
        except OSError:
            # The next line opens the file anew: a server that came back knows no old descriptor.
            with suppress(OSError):
                self._let_go()
            raise

    def _split(self, always: Words) -> None:
        """Begin the file anew; where that fails, it is tried again after as many bytes more."""
        self._most = self._size + parts.PART_BYTES
        parts.split_off(self._path, always)
        self._most = parts.PART_BYTES
        self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def close(self) -> None:
        """Write nothing from now on."""
        with unessential(self._path):
            self._closed = True
            self._let_go()


Sound = Callable[[dict[str, Any]], bool]
"""Whether an object is what its line should hold."""


def read_lines(path: Path, is_sound: Sound, always: Words = ()) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, none where there is no file, and how many lines are damaged.

    A last line that a kill cut short counts as damaged, an empty one does not. Its parts come
    before it; of these and of a long file see :func:`~partialfc.records.parts.some_lines`.

    Args:
        path: A file of :class:`Lines`.
        is_sound: Whether an object is what its line should hold.
        always: As of :data:`~partialfc.records.parts.Words`.

    Raises:
        OSError: If there is a file and it cannot be read, or it is none.
    """
    entries, damaged = [], 0
    with ExitStack() as stack:
        own: Iterator[bytes] = iter(())
        inode = 0
        with suppress(FileNotFoundError):
            file = stack.enter_context(os.fdopen(opened(path, os.O_RDONLY), "rb"))
            status = os.fstat(file.fileno())
            inode, own = status.st_ino, some_lines(lines_in(file), status.st_size, always)
        for line in chain(parts.earlier_lines(path, always, inode), own):
            if (entry := parsed(line, is_sound)) is not None:
                entries.append(entry)
            else:
                damaged += bool(line.strip())
    return entries, damaged


def parsed(line: bytes, is_sound: Sound) -> dict[str, Any] | None:
    """Return the object of a line, or ``None`` if it is damaged."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and is_sound(entry) else None


Belongs = Callable[[dict[str, Any]], bool]


def cut_after(path: Path, is_sound: Sound, belongs: Belongs, always: Words) -> None:
    """Drop the lines behind the last one that belongs to a file and its parts, if there are any.

    Only what is dropped is read, and the part that has the last line.

    Raises:
        OSError: If it cannot be read or written, or is no file.
    """
    _cut(path, is_sound, belongs)
    if path.exists() and path.stat().st_size:
        return
    for part in reversed(parts.parts_of(path)):
        before = part.stat().st_size
        _cut(part, is_sound, belongs)
        if after := part.stat().st_size:
            if after < before:
                parts.write_some(part, part, always)
            return
        parts.remove(part)


def _cut(path: Path, is_sound: Sound, belongs: Belongs) -> None:
    """The same for one of these files."""
    try:
        descriptor = opened(path, os.O_RDWR)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        for end, line in _backwards(file):
            entry = parsed(line, is_sound)
            if entry is not None and belongs(entry):
                os.ftruncate(descriptor, end)
                return
        os.ftruncate(descriptor, 0)


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from its last to its first, and where each ends."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start:
        end, start = start, max(0, start - _BLOCK)
        file.seek(start)
        rest = file.read(end - start) + rest
        place = start + len(rest)
        lines = rest.splitlines(keepends=True)
        rest = lines.pop(0) if start and lines else b""  # it may begin further ahead
        for line in reversed(lines):
            yield place, line
            place -= len(line)
        if len(rest) > LONGEST_LINE:  # damaged, and so are its pieces
            rest = b""


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number to reckon with: what is made of such is finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1e-99 < abs(value) < 1e99


def is_step(value: object) -> bool:
    """Whether a value of JSON counts steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
