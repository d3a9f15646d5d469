"""Records are not essential: what cannot be written is named once and counted, and ends nothing.

A full disk, a pipe that nobody reads any more or a terminal that is gone must not cost a night of
training. Only a checkpoint is essential, and it is written elsewhere.
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from partialfc.errors import in_words

_lost: Counter[str] = Counter()
_counting = threading.Lock()


def lost_records() -> int:
    """Return how many records this process could not write."""
    return _lost.total()


@contextmanager
def unessential(what: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Write something inside that training can do without; an error of the system ends there.

    Args:
        what: For the warning: a file, or the name of a stream.
        also: Errors of other programs that end there as well.
    """
    ends: tuple[type[Exception], ...] = (OSError, ValueError, *also)  # ValueError: a closed file
    try:
        yield
    except ends as error:
        with _counting:
            _lost[str(what)] += 1
            first = _lost[str(what)] == 1
        if first:
            _warn(f"warning: {what} cannot be written: {_reason(error)}. Training goes on.\n")


def _reason(error: Exception) -> str:
    words = in_words(error)
    return error.strerror or words if isinstance(error, OSError) else words


def _warn(text: str) -> None:
    """On stderr, or where that is what cannot be written, on stdout."""
    for stream in (sys.stderr, sys.stdout):
        inner = getattr(stream, "unguarded", stream)
        with suppress(OSError, ValueError, AttributeError):
            inner.write(text)
            inner.flush()
            return


class _Stream:
    """A text stream whose reader may leave."""

    def __init__(self, unguarded: TextIO, name: str) -> None:
        self.unguarded, self._name = unguarded, name

    def write(self, text: str) -> int:
        with unessential(self._name):
            self.unguarded.write(text)
        return len(text)

    def flush(self) -> None:
        with unessential(self._name):
            self.unguarded.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


@contextmanager
def unessential_streams() -> Iterator[None]:
    """Inside, whatever is printed may be lost: ``| head -1``, a lost ssh, a full disk."""
    before = sys.stdout, sys.stderr
    names = "standard output", "standard error"
    sys.stdout, sys.stderr = (
        None if stream is None else _Stream(stream, name)
        for stream, name in zip(before, names, strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream, name in zip(before, names, strict=True):
            if _lost[name] and stream is not None:
                _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """What a stream still holds has nowhere to go, and is no failure of the process's end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
