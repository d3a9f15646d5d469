"""Bytes of shards by range: of files on a disk, or at a URL through fsspec.

A request that fails for a reason that may pass is made again, ``ATTEMPTS`` times in all with longer
and longer waits between, and said on stderr. fsspec is imported where a URL is opened, and nowhere
else.
"""

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from partialfc.data.files.index import is_hidden
from partialfc.data.tars.places import SUFFIX, expanded, shards_in_folder
from partialfc.definitions.urls import shown, url_of
from partialfc.errors import in_words

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each wait is twice the one before, 15.5 s together."""

_LASTING = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What fails again however often it is asked for."""
_TAGS = (
    *("ETag", "etag", "md5Hash", "content_md5"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "created"),
)
"""What stores call it, surest first."""
_QUIET = 5.0

Stamp = tuple[int, str]
"""Of a shard: its bytes, and what changes when its content does: a time, or the store's ETag."""
Found = TypeVar("Found")


class ShardError(ValueError):
    """A shard is missing, damaged, another one than it was, or cannot be reached; it is named."""


class Store(Protocol):
    """Shards by name."""

    is_far: bool
    """Whether each request has to wait for somebody, so that many should be under way."""

    def shards(self) -> list[str]:
        """Return the names of the shards, in their order."""

    def stamp(self, shard: str) -> Stamp:
        """Return what a shard is now; raise ShardError if it is not there."""

    def read(self, shard: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a shard, fewer if it ends before; as :meth:`stamp`."""

    def will_need(self, shard: str, start: int, stop: int) -> None:
        """Begin to read, if that costs nothing."""


def open_store(path: Path) -> Store:
    """Return the store of the shards at a path.

    Raises:
        ValueError: If a URL is of a kind that is not known.
        ModuleNotFoundError: If it is a URL, and fsspec is not installed.
    """
    url = url_of(path)
    return _Files(path) if url is None else _Far(url)


class ShardFile(io.RawIOBase):
    """A shard as a file that is read from front to back; wrap it in a BufferedReader."""

    def __init__(self, store: Store, shard: str, size: int) -> None:
        self._store, self._shard, self._size, self._at = store, shard, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with one request."""
        stop = min(self._at + len(buffer), self._size)
        data = self._store.read(self._shard, self._at, stop) if self._at < stop else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Files:
    """Shards on a disk."""

    is_far = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def shards(self) -> list[str]:
        if self._path.is_dir():
            return shards_in_folder(self._path)
        return [str(self._path)] if self._path.exists() else expanded(str(self._path))

    def stamp(self, shard: str) -> Stamp:
        try:
            status = os.stat(shard)  # noqa: PTH116  a name, as those of the other store
        except OSError as error:
            raise ShardError(in_words(error)) from error
        return status.st_size, str(status.st_mtime_ns)

    def read(self, shard: str, start: int, stop: int) -> bytes:
        file = self._opened(shard)
        try:
            data = os.pread(file, stop - start, start)
            while len(data) < stop - start:
                more = os.pread(file, stop - start - len(data), start + len(data))
                if not more:
                    break
                data += more  # some network file systems give less than is asked for
            return data
        finally:
            os.close(file)

    def will_need(self, shard: str, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            file = self._opened(shard)
            try:
                os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def _opened(self, shard: str) -> int:
        try:
            return os.open(shard, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise ShardError(f"{in_words(error)} It was there when the run began.") from error


class _Far:
    """Shards at a URL."""

    is_far = True

    def __init__(self, url: str) -> None:
        import fsspec

        self._url, self._said = url, 0.0
        self._paths: dict[str, str] = {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(expanded(url)[0])
        except ImportError as error:  # fsspec says what a kind of URL needs
            raise ValueError(f"{url}: {error}.") from error
        except ValueError as error:  # of a kind that nobody knows
            raise ValueError(
                f"{url}: no package here reads it: {error}. Install the one for it, or name a "
                "folder or a kind that fsspec knows."
            ) from error

    def shards(self) -> list[str]:
        self._paths = self._patterned() if self._is_pattern() else self._in_folder()
        return list(self._paths)

    def _is_pattern(self) -> bool:
        return self._url.partition("?")[0].endswith(SUFFIX)

    def _patterned(self) -> dict[str, str]:
        from fsspec.core import url_to_fs

        return {name: str(url_to_fs(name)[1]) for name in expanded(self._url)}

    def _in_folder(self) -> dict[str, str]:
        if self._url.endswith(".rec"):
            raise ShardError(
                f"{self._url}: a pack is read by mapping its file, which a URL has not. Copy it to "
                "a disk, or write its images into tar shards."
            )
        paths = self._asked(self._url, lambda: self._fs.ls(self._root, detail=False))
        names = {f"{self._url}/{path.rpartition('/')[2]}": str(path) for path in paths}
        chosen = {
            name: names[name]
            for name in sorted(names)
            if name.endswith(SUFFIX) and not is_hidden(name.rpartition("/")[2])
        }
        if not chosen:
            raise ShardError(
                f"{self._url}: {len(names):,} entries and no {SUFFIX} among them. It must be a "
                f"shard, several as in {{0000..0012}}{SUFFIX}, or a folder of shards."
            )
        return chosen

    def stamp(self, shard: str) -> Stamp:
        def asked() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return dict(self._fs.info(self._paths[shard]))

        found = self._asked(shard, asked)
        size = found.get("size")
        if not isinstance(size, int):
            raise ShardError(f"{shard}: its store does not say how many bytes it has.")
        return size, next((str(found[tag]) for tag in _TAGS if found.get(tag) is not None), "")

    def read(self, shard: str, start: int, stop: int) -> bytes:
        path = self._paths[shard]
        data = bytes(self._asked(shard, lambda: self._fs.cat_file(path, start, stop)))
        if len(data) > stop - start:
            raise ShardError(
                f"{shard}: asked for {stop - start:,} bytes, its store gave {len(data):,}: it does "
                "not know ranges of bytes. Copy the shards to one that does."
            )
        return data

    def will_need(self, shard: str, start: int, stop: int) -> None:
        pass

    def _asked(self, shard: str, request: Callable[[], Found]) -> Found:
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request()
            except FileNotFoundError as error:
                raise ShardError(f"{shard}: there is no such shard.") from error
            except Exception as error:  # stores raise their libraries' own
                why = f"{type(error).__name__}: {error}"
                if isinstance(error, _LASTING) or attempt == ATTEMPTS:
                    times = f" {attempt} times" if attempt > 1 else ""
                    raise ShardError(
                        f"{shard}: it could not be read{times}: {why}. Check the store, the "
                        "rights to it and the network; a run goes on with the same command."
                    ) from error
                self._say(f"{shard}: {why}; attempt {attempt + 1} of {ATTEMPTS} in {wait:g} s.")
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _say(self, text: str) -> None:
        """Of many requests that fail at once, one is said."""
        if time.monotonic() > self._said + _QUIET:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def named(path: Path, problem: str) -> ShardError:
    """Return the error that says a problem of shards at a path."""
    return ShardError(f"{shown(path)}: {problem}")
