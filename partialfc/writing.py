"""Files that are written whole or not at all, and opened only if they are files."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; the file there takes its place at the end.

    A reader sees the old file or the new one. If the block fails, ``path`` stays as it was. A link
    of one's own stays a link, and its file is replaced; what is no file, such as a pipe, is written
    to. Nobody can guess the name beside it, and the file there is new.

    Args:
        path: Replaced if it exists; its folder is made.

    Raises:
        OSError: If the file cannot take its place, or somebody else made ``path`` a link.
    """
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing can take its place
        yield path
        return
    path = led_to(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def led_to(path: Path) -> Path:
    """Return the path, or where it leads if it is a link of this user's or root's.

    Raises:
        OSError: If it is a link that somebody else made, in a folder that others can write to.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return path
    if not stat.S_ISLNK(status.st_mode):
        return path
    if status.st_uid not in (0, os.getuid()):
        raise OSError(errno.ELOOP, "somebody else made it a link; remove it", str(path))
    return path.resolve()


def opened(path: Path, flags: int) -> int:
    """Return the descriptor of a file; to write, a link is followed as in :func:`led_to`.

    Args:
        path: A file, or a name for one.
        flags: Of :func:`os.open`.

    Raises:
        OSError: If it cannot be opened, or is a pipe, a device or a folder; none is waited for.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        path, flags = led_to(path), flags | getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return descriptor


def read_bytes(path: Path, *, most: int) -> bytes:
    """Return the bytes of a file.

    Args:
        path: A file.
        most: Bytes that it may have.

    Raises:
        OSError: If it cannot be read, is no file, or has more bytes.
    """
    with os.fdopen(opened(path, os.O_RDONLY), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def read_text(path: Path, *, most: int = 1 << 24) -> str:
    """Return a file of UTF-8 that a person wrote.

    Args:
        path: A file.
        most: Bytes that it may have.

    Raises:
        OSError: If it cannot be read, is no file, or has more bytes.
        UnicodeDecodeError: If it is not UTF-8.
    """
    return read_bytes(path, most=most).decode()


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
