"""A file system of fsspec that is as slow as a store far away: ``slow:///path/of/this/machine``.

Every request waits, and all of them together get so many bytes a second. It can fail on purpose.
"""

import threading
import time
from pathlib import Path
from typing import Any

import fsspec


class SlowFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Files of this machine, by range.

    Attributes:
        latency: Seconds that a request waits before its first byte.
        bandwidth: Bytes a second of all requests together.
        requests: How many ranges were asked for.
        sent: Bytes of them.
        failures: Errors that the next requests for a range raise, one each.
        most: Requests that were under way at once.
    """

    protocol = "slow"
    cachable = False
    latency, bandwidth = 0.0, 1e12
    requests, sent, under_way, most = 0, 0, 0, 0
    failures: list[Exception] = []  # noqa: RUF012  a switch of the whole process
    _lock = threading.Lock()
    _free_at = 0.0

    @classmethod
    def reset(cls, latency: float = 0.0, bandwidth: float = 1e12) -> None:
        """Set the pace, and count anew."""
        cls.latency, cls.bandwidth = latency, bandwidth
        cls.requests, cls.sent, cls.most = 0, 0, 0
        cls.failures = []

    @classmethod
    def _file(cls, path: str) -> Path:
        return Path("/", cls._strip_protocol(path))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Return size and time of a file."""
        time.sleep(self.latency)
        status = self._file(path).stat()
        return {"name": path, "size": status.st_size, "type": "file", "mtime": status.st_mtime_ns}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Return the files of a folder."""
        names = [str(file) for file in self._file(path).iterdir()]
        return [self.info(name) for name in names] if detail else names

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Return bytes [start, end) of a file, when they have come."""
        cls = type(self)
        with cls._lock:
            cls.requests += 1
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
            failure = cls.failures.pop() if cls.failures else None
        try:
            if failure is not None:
                raise failure
            with self._file(path).open("rb") as file:
                file.seek(start or 0)
                data = file.read(-1 if end is None else end - (start or 0))
            now = time.monotonic()
            with cls._lock:
                cls.sent += len(data)
                cls._free_at = max(cls._free_at, now + cls.latency) + len(data) / cls.bandwidth
                until = cls._free_at
            time.sleep(max(0.0, until - now))
            return data
        finally:
            with cls._lock:
                cls.under_way -= 1


fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
