"""The index of a large pack, kept in a file that all processes of a machine share.

Reading the ``.idx`` of 42 million records takes a while and 340 MB of memory in every process; the
kept one is mapped. It is beside the pack (``train.rec.index``), or in the user's cache folder where
that place is read-only, and is made again when the pack changes. Its first 4096 bytes are JSON; the
offsets follow as int64, then the keys unless they are consecutive, then the offsets in the order of
the file unless that is the order of the keys.

Shape suffix: M = records of the pack.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.data.found_whole import found_whole, is_whole
from partialfc.data.packs.index import RecordIndex, read_index
from partialfc.data.packs.recordio import RecordFile
from partialfc.writing import atomic_write

KEPT_FROM = 1 << 17
"""Records of the smallest pack whose index is kept; smaller ones are read in a moment."""

_FORMAT = "partialfc index 1"
_SCANNED = "partialfc index 2"
"""Of a pack without an ``.idx``; in 1 its records were in the order of the file, not of keys."""
_HEADER = 4096
_SECONDS_TO_WAIT, _SECONDS_OF_SILENCE = 60.0, 3.0
"""For a lock that somebody else holds, and before that is said."""


def open_index(file: RecordFile) -> RecordIndex:
    """Return the records of a pack, from the kept index if it is of this very pack.

    Raises:
        RecordError: As :func:`~partialfc.data.packs.index.read_index`.
    """
    stamp = _stamp(file)
    index = _kept(file, stamp)
    if index is not None:
        return index
    with alone(file.path):  # of several ranks one reads the .idx, the others what it kept
        index = _kept(file, stamp)
        if index is not None:
            return index
        index = read_index(file)
        if len(index) >= KEPT_FROM and _keep(file, stamp, index):
            return _kept(file, stamp) or index
        return index


def cache_places(path: Path, name: str) -> list[Path]:
    """Return where something about a pack may be kept, the best place first.

    Args:
        path: Of the ``.rec``.
        name: What is kept; the end of the file's name.
    """
    places = [path.with_name(f"{path.name}.{name}")]
    with suppress(RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        places.append(folder / "partialfc" / f"{path.stem}.{digest}.{name}")
    return places


def kept_column(file: RecordFile, name: str, count: int) -> NDArray[np.int32] | None:
    """Return ``count`` numbers that are kept of a pack, mapped, if they are whole and of it."""
    stamp = _stamp(file)
    for place in cache_places(file.path, name):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            header, content = read_kept(place)
            if header["stamp"] != stamp or len(content) != 4 * count:
                continue
            values: NDArray[np.int32] = content.view("<i4")
            if is_whole(place) or header["digest"] == _digest(values):
                found_whole(place)
                return values
    return None


def keep_column(file: RecordFile, name: str, values: NDArray[np.int32]) -> None:
    """Keep numbers of a pack, if there is a place for them."""
    header = {"stamp": _stamp(file), "digest": _digest(values)}
    write_kept(cache_places(file.path, name), header, [np.ascontiguousarray(values, "<i4")])


def _digest(values: NDArray[np.integer]) -> str:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return hashlib.blake2b(little.data, digest_size=8).hexdigest()


def _stamp(file: RecordFile) -> dict[str, Any]:
    """What a kept index must be of: sizes and times of both files."""
    stamp: dict[str, Any] = {}
    for path in (file.path, file.path.with_suffix(".idx")):
        with suppress(FileNotFoundError):
            status = path.stat()
            stamp[path.suffix] = [status.st_size, status.st_mtime_ns]
    return {"format": _FORMAT if ".idx" in stamp else _SCANNED, **stamp}


def _kept(file: RecordFile, stamp: dict[str, Any]) -> RecordIndex | None:
    for path in cache_places(file.path, "index"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return _load(path, file, stamp)
    return None


def _load(path: Path, file: RecordFile, stamp: dict[str, Any]) -> RecordIndex:
    """The index that is kept at ``path``; ValueError and the like if it is not what it should be.

    It is hashed by one rank of the host, so damage is found; every offset is checked again when its
    record is read.
    """
    header, content = read_kept(path)
    if {name: header[name] for name in stamp} != stamp:
        raise ValueError("of another pack")
    count, first, of_sorted = header["records"], header["first_key"], header["sorted"]
    columns = 1 + (first is None) + (of_sorted is not None)
    if not isinstance(count, int) or count < 1 or len(content) != 8 * columns * count:
        raise ValueError("not whole")
    values: NDArray[np.int64] = content.view("<i8")
    if first is not None and not (isinstance(first, int) and 0 <= first < 1 << 62):
        raise ValueError("no key")
    keys = range(first, first + count) if first is not None else values[count : 2 * count]
    sorted_M = values[-count:] if of_sorted is not None else None
    index = RecordIndex(keys, values[:count], sorted_M)
    if is_whole(path):
        index.note_fingerprint(str(header["fingerprint"]), file.size)
    elif index.fingerprint(file.size) != header["fingerprint"] or (
        sorted_M is not None and _digest(sorted_M) != of_sorted
    ):
        raise ValueError("damaged")
    found_whole(path)
    return index


def _keep(file: RecordFile, stamp: dict[str, Any], index: RecordIndex) -> bool:
    """Whether the index could be written somewhere."""
    consecutive = isinstance(index.key_M, range)
    header = stamp | {
        "records": len(index),
        "first_key": index.key_M[0] if consecutive else None,
        "fingerprint": index.fingerprint(file.size),
        "sorted": None if index.sorted_M is None else _digest(index.sorted_M),
    }
    columns = [index.offset_M]
    columns += [] if consecutive else [np.asarray(index.key_M)]
    columns += [] if index.sorted_M is None else [index.sorted_M]
    columns = [np.ascontiguousarray(column, "<i8") for column in columns]
    return write_kept(cache_places(file.path, "index"), header, columns)


def read_kept(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Return the header of a kept file, unchecked, and all bytes behind it, mapped.

    Raises:
        ValueError, OSError: If there is no such file.
    """
    with path.open("rb") as stream:
        header = json.loads(stream.read(_HEADER))
    return header, np.memmap(path, np.uint8, "r", _HEADER).view(np.ndarray)


def write_kept(places: list[Path], header: dict[str, Any], columns: list[NDArray[Any]]) -> bool:
    """Return whether header and columns could be written to one of the places, whole."""
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial, partial.open("wb") as stream:
                stream.write(json.dumps(header).encode().ljust(_HEADER))
                for column in columns:
                    stream.write(column.data)
        except OSError:
            continue
        return True
    return False


def _wait_for_lock(handle: int, path: Path, seconds: float) -> None:
    began, said = time.monotonic(), False
    while (waited := time.monotonic() - began) < seconds:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if waited > _SECONDS_OF_SILENCE and not said:
            said = True
            print(
                f"{path}: another process holds its lock, perhaps to read its index; going on "
                f"without it after {seconds:.0f} s.",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.05)


@contextmanager
def alone(path: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder, where its file system has locks.

    One that another process keeps is waited for a minute, or ``seconds``, and said so: what comes
    of it is time saved, and two processes may do the same without harm.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            _wait_for_lock(handle, path, _SECONDS_TO_WAIT if seconds is None else seconds)
        yield
    finally:
        os.close(handle)
