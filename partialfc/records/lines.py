"""Files of JSON objects, one a line, that grow: a lost or damaged line costs itself alone."""

import errno
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.records.unessential import unessential
from partialfc.writing import opened

_LONGEST_LINE = 1 << 20
_SECONDS_TO_WAIT = 5.0


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


def read_lines(
    path: Path, is_sound: Callable[[dict[str, Any]], bool]
) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, none where there is no file, and how many lines are damaged.

    A last line that a kill cut short counts as damaged, an empty one does not.

    Args:
        path: A file of :class:`Lines`.
        is_sound: Whether an object is what its line should hold.

    Raises:
        OSError: If there is a file and it cannot be read, or it is none.
    """
    entries, damaged = [], 0
    try:
        descriptor = opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return [], 0
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError):
                damaged += bool(line.strip())
                continue
            if isinstance(entry, dict) and is_sound(entry):
                entries.append(entry)
            else:
                damaged += 1
    return entries, damaged


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number to reckon with: what is made of such is finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1e-99 < abs(value) < 1e99


def is_step(value: object) -> bool:
    """Whether a value of JSON counts steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
