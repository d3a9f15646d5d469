"""Files of JSON objects, one a line, that grow: a lost or damaged line costs itself alone."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from partialfc.records.unessential import unessential
from partialfc.writing import opened

LONGEST_LINE = 1 << 20
_BLOCK = 1 << 16
_SECONDS_TO_WAIT = 5.0
WHOLE_BYTES = 32 << 20
"""A longer file is not read line for line;"""
SOME_LINES = 20_000
"""but about so many of it, spread evenly: more than any picture has points."""


class Lines:
    """Appends to a file, which is made with the first line; any thread may.

    A line that cannot be written is lost (:mod:`partialfc.records.unessential`). What a kill or a
    full disk left of one is ended before the next, so that no two become one.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1
        self._closed = False
        self._writing = threading.Lock()

    def append(self, line: str) -> None:
        """Write one line, without its end."""
        with unessential(self._path):
            if not self._writing.acquire(timeout=_SECONDS_TO_WAIT):
                raise TimeoutError(errno.ETIMEDOUT, "another line has not come to its end")
            try:
                if not self._closed:
                    self._write(line)
            finally:
                self._writing.release()

    def _write(self, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            if self._file < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = opened(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
                size = os.fstat(self._file).st_size
                if size and os.pread(self._file, 1, size - 1) != b"\n":
                    data = b"\n" + data
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            # The next line opens the file anew: a server that came back knows no old descriptor.
            with suppress(OSError):
                self._let_go()
            raise

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


def read_lines(
    path: Path, is_sound: Sound, always: tuple[bytes, ...] = ()
) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, none where there is no file, and how many lines are damaged.

    A last line that a kill cut short counts as damaged, an empty one does not. Of a file above
    ``WHOLE_BYTES``, see :func:`some_lines`.

    Args:
        path: A file of :class:`Lines`.
        is_sound: Whether an object is what its line should hold.
        always: As in :func:`some_lines`.

    Raises:
        OSError: If there is a file and it cannot be read, or it is none.
    """
    entries, damaged = [], 0
    try:
        descriptor = opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return [], 0
    with os.fdopen(descriptor, "rb") as file:
        for line in some_lines(file, os.fstat(descriptor).st_size, always):
            if (entry := parsed(line, is_sound)) is not None:
                entries.append(entry)
            else:
                damaged += bool(line.strip())
    return entries, damaged


def some_lines(file: BinaryIO, size: int, always: tuple[bytes, ...] = ()) -> Iterator[bytes]:
    """Yield the lines of a file in order: all, or of a long one those that tell most of it.

    That is ``SOME_LINES`` spread evenly, the last, and those that hold one of some words, each with
    the line before it.

    Args:
        file: At its first line.
        size: Bytes of it, from there.
        always: The words.
    """
    stride = size / SOME_LINES if size > WHOLE_BYTES else 0.0
    at, due, before = 0, 0.0, b""
    while line := file.readline(LONGEST_LINE):
        at += len(line)
        if wanted := any(word in line for word in always) if stride else False:
            yield from filter(None, [before])
        before = b""
        if at > due or wanted:
            due += stride * (at > due)
            yield line
        else:
            before = line
    yield from filter(None, [before])


def parsed(line: bytes, is_sound: Sound) -> dict[str, Any] | None:
    """Return the object of a line, or ``None`` if it is damaged."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and is_sound(entry) else None


def cut_after(path: Path, is_sound: Sound, belongs: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines behind the last one that belongs to a file, if there is the file.

    Only what is dropped is read.

    Raises:
        OSError: If it cannot be read or written, or is no file.
    """
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
