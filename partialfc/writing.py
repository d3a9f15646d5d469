"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; the file there takes its place at the end.

    A reader sees the old file or the new one. If the block fails, ``path`` stays as it was. A link
    stays a link, and its file is replaced; what is no file, such as a pipe, is written to.

    Args:
        path: Replaced if it exists; its folder does.

    Raises:
        OSError: If the file cannot take its place.
    """
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing can take its place
        yield path
        return
    if path.is_symlink():
        path = path.resolve()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
