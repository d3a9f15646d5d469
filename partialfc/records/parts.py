"""Files of records that grow for months, in parts, and how much is read of them.

    metrics.jsonl                   the newest records
    metrics.parts/000001.jsonl      those before them, oldest first, every one as it was written
    metrics.parts/000001.some.jsonl a line with the bytes of that part, and some of its lines

A file that has come to ``PART_BYTES`` becomes a part, and what tells most of it is written beside
it. Readers take that, so that a page, a report and a start cost the same after a day and after a
year. Where it is missing or of other bytes, they read the part.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from partialfc.writing import led_to, opened, write_bytes

LONGEST_LINE = 1 << 20
PART_BYTES = 8 << 20
_LINES_OF_A_PART = 200
"""Lines of a part, spread evenly, that are written beside it."""
WHOLE_BYTES = 4 << 20
"""More is not read line for line;"""
SOME_LINES = 10_000
"""but about so many lines of it, spread evenly: more than any picture has points."""
_PART = re.compile(r"[0-9]{6,18}\.jsonl")
_SOME = ".some.jsonl"

Words = tuple[bytes, ...]
"""A line that holds one of them is read always, and the line before it too."""


def parts_of(path: Path) -> list[Path]:
    """Return the parts of a file of records, oldest first."""
    folder = path.with_suffix(".parts")
    with suppress(OSError):
        return sorted(one for one in folder.iterdir() if _PART.fullmatch(one.name))
    return []


def split_off(path: Path, always: Words) -> None:
    """Make a file of records its newest part; the next record begins it anew.

    A kill leaves it a part or none: what is beside a part is written first.

    Raises:
        OSError: If that cannot be done; nothing is lost then.
    """
    before = parts_of(path)
    number = 1 + (int(before[-1].stem) if before else 0)
    part = path.with_suffix(".parts") / f"{number:06d}.jsonl"
    write_some(part, path, always)
    led_to(path).rename(part)


def write_some(part: Path, path: Path, always: Words) -> None:
    """Write beside a part what is read of it.

    Args:
        part: Its name.
        path: Where its lines are.
        always: As of :data:`Words`.

    Raises:
        OSError: If one cannot be read or the other not be written.
    """
    with os.fdopen(opened(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        wanted = max(_LINES_OF_A_PART, min(SOME_LINES, _LINES_OF_A_PART * size // PART_BYTES))
        some = b"".join(spread(lines_in(file), size / wanted, always))
    head = json.dumps({"bytes": size}).encode() + b"\n"
    write_bytes(_some_of(part), head + some)


def remove(part: Path) -> None:
    """Remove a part and what is beside it."""
    _some_of(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def earlier_lines(path: Path, always: Words, but: int = 0) -> Iterator[bytes]:
    """Yield lines of the parts of a file in order: as :func:`some_lines` of what is beside them.

    Args:
        path: Of the file.
        always: As of :data:`Words`.
        but: Inode of a part that is left out: the file itself, if it became one meanwhile.
    """
    sources = []
    for part in parts_of(path):
        with suppress(OSError):
            status = part.stat()
            if status.st_ino != but:
                beside = _some_of(part)
                sources.append(beside if _bytes_of(beside) == status.st_size else part)
    size = sum(source.stat().st_size for source in sources)
    yield from some_lines(_chained(sources), size, always)


def _chained(sources: Iterable[Path]) -> Iterator[bytes]:
    for source in sources:
        with suppress(OSError), os.fdopen(opened(source, os.O_RDONLY), "rb") as file:
            if source.name.endswith(_SOME):
                file.readline(LONGEST_LINE)
            yield from lines_in(file)


def _some_of(part: Path) -> Path:
    return part.with_name(part.stem + _SOME)


def _bytes_of(beside: Path) -> int | None:
    """The bytes of the part that a summary is of."""
    try:
        with os.fdopen(opened(beside, os.O_RDONLY), "rb") as file:
            size = json.loads(file.readline(LONGEST_LINE))["bytes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return size if isinstance(size, int) else None


def lines_in(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file from where it is, of bounded length."""
    return iter(partial(file.readline, LONGEST_LINE), b"")


def some_lines(lines: Iterator[bytes], size: int, always: Words = ()) -> Iterator[bytes]:
    """Yield lines in order: all, or of many bytes those that tell most of them.

    That is ``SOME_LINES`` spread evenly, the last, and those that hold one of some words, each with
    the line before it.

    Args:
        lines: All.
        size: Bytes of them.
        always: The words.
    """
    return spread(lines, size / SOME_LINES, always) if size > WHOLE_BYTES else lines


def spread(lines: Iterator[bytes], stride: float, always: Words) -> Iterator[bytes]:
    """Yield a line of every so many bytes, the last, and those with a word and before it."""
    at, due, before = 0, 0.0, b""
    for line in lines:
        at += len(line)
        wanted = any(word in line for word in always)
        if wanted and before:
            yield before
        before = b""
        if at > due or wanted:
            due += stride * (at > due)
            yield line
        else:
            before = line
    if before:
        yield before
