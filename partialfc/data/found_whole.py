"""Kept files that a rank of this host has just compared with their sources and found whole.

Where eight ranks of a host open one index, one of them looks at its source and hashes it, and tells
the others which file that was: by its place, number, size and times, as the kernel says them. A
file that was touched since, or is another one there, is looked at again by whoever opens it.
"""

import hashlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

BYTES = 8
"""Of what stands for a file."""

_own: set[bytes] = set()
_told: set[bytes] = set()


def is_whole(place: Path) -> bool:
    """Whether a rank of this host has found this very file whole.

    Raises:
        OSError: If there is no such file.
    """
    return _mark(place) in _told


def found_whole(place: Path) -> None:
    """Note that this process has."""
    _own.add(_mark(place))


def own() -> Set[bytes]:
    """Return what stands for the files that this process found whole."""
    return frozenset(_own)


@contextmanager
def trusting(marks: Set[bytes]) -> Iterator[None]:
    """Take it from others of this host, inside."""
    _told.update(marks)
    try:
        yield
    finally:
        _told.clear()


def _mark(place: Path) -> bytes:
    status = place.stat()
    seen = (
        str(place.resolve()),
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return hashlib.blake2b(repr(seen).encode(), digest_size=BYTES).digest()
