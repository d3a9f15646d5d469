"""Disks that fail: the other side of :class:`partialfc.checkpoint.disk.Disk`, for tests and the
benchmark."""

import random
from pathlib import Path
from typing import BinaryIO

from partialfc.checkpoint.disk import Bytes, Disk


class Died(BaseException):
    """The process is gone: nothing that would tidy up behind an exception catches it."""


class DyingDisk(Disk):
    """Does ``operations`` operations and dies in the next one, after which nothing works.

    With ``power`` it is the machine that dies: what was not synced is lost, so files hold only
    what they held when they were last synced, and the last write may be half done.
    """

    def __init__(self, operations: int, *, power: bool = False) -> None:
        self.left, self.done, self._power = operations, 0, power
        self._safe: dict[Path, int] = {}

    def make_folder(self, path: Path) -> None:
        """As it is, or death."""
        self._count()
        super().make_folder(path)

    def write(self, file: BinaryIO, data: Bytes) -> None:
        """As it is; half of it, and death."""
        path = Path(file.name)
        self._safe.setdefault(path, 0)
        try:
            self._count()
        except Died:
            file.write(data[: len(data) // 2])
            file.flush()
            self._lose()
            raise
        super().write(file, data)

    def sync(self, path: Path) -> None:
        """As it is, or death before it."""
        self._count()
        super().sync(path)
        if path.is_file():
            self._safe[path] = path.stat().st_size

    def rename(self, old: Path, new: Path) -> None:
        """As it is, or death before it."""
        self._count()
        super().rename(old, new)
        moved = {p: size for p, size in self._safe.items() if p.is_relative_to(old)}
        for path, size in moved.items():
            del self._safe[path]
            self._safe[new / path.relative_to(old)] = size

    def remove(self, path: Path) -> None:
        """As it is; half of a folder's files, and death."""
        try:
            self._count()
        except Died:
            for file in sorted(path.rglob("*"))[::2] if path.is_dir() else ():
                file.unlink()
            raise
        super().remove(path)

    def _count(self) -> None:
        if self.left <= 0:
            self._lose()
            raise Died
        self.left, self.done = self.left - 1, self.done + 1

    def _lose(self) -> None:
        """A machine that dies loses what it had not synced."""
        if not self._power:
            return
        for path, size in self._safe.items():
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(size)
        self._safe = {}


class FullDisk(Disk):
    """Takes so many bytes and no more."""

    def __init__(self, capacity: int) -> None:
        self.left = capacity

    def write(self, file: BinaryIO, data: Bytes) -> None:
        """As it is, or ``ENOSPC`` as a file system gives it."""
        if len(data) > self.left:
            raise OSError(28, "No space left on device", file.name)
        self.left -= len(data)
        super().write(file, data)


def damage(folder: Path, chance: random.Random) -> str:
    """Do one thing to a checkpoint's files that a disk, a copy or a person may do; say what."""
    files = sorted(folder.iterdir())
    file = chance.choice(files)
    data = file.read_bytes()
    kind = chance.choice(("flip", "flip", "flip", "cut", "grow", "missing", "swap", "zero"))
    if kind == "flip":
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
    elif kind == "cut":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "grow":
        file.write_bytes(data + chance.randbytes(1 + chance.randrange(64)))
    elif kind == "missing":
        file.unlink()
    elif kind == "swap":
        other = chance.choice([one for one in files if one != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        start = chance.randrange(len(data))
        stop = min(len(data), start + 4096)
        if not any(data[start:stop]):  # zeroes over zeroes are no damage
            start, stop = 0, len(data)
        file.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    return f"{kind} {file.name}"
