"""Lists of image files and their identities: our own, mxnet's and insightface's."""

import codecs
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_LONGEST_LINE = 1 << 16
_LONGEST_LABEL = 256
_COLUMNS = frozenset(
    "path file filename image image_path img identity label id class person".split()  # noqa: SIM905
)
"""Words of which a line with the names of columns is made."""


def list_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path and identity of every line of a list that is not blank.

    The first one tells the kind: ``path<TAB>identity``, mxnet's ``number<TAB>label<TAB>path`` or
    insightface's ``aligned<TAB>path<TAB>label``. Names of columns before it are no image.

    Raises:
        ValueError: If a line is not so, a path leads out of the folder of the list, or the list is
            no regular file, or in UTF-16.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: must be a .rec, a folder of folders or a list, a regular file.")
    kind, may_be_names = None, True
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: the list is in UTF-16: save it as UTF-8.")
            text = os.fsdecode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if not text:
                continue
            if may_be_names and {word.lower() for word in text.split()} <= _COLUMNS:
                may_be_names = False
                continue
            may_be_names, kind = False, kind or _kind_of(text)
            name, label = kind.columns(text)
            if not (len(line) < _LONGEST_LINE and name and 0 < len(label) <= _LONGEST_LABEL):
                raise ValueError(f"{path}: line {number}: {text[:60]!r} must be {kind.words}.")
            if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError(
                    f"{path}: line {number}: path {name[:60]!r} must lead to a file below "
                    f"{path.parent}: it may not begin with / or have .. in it. Put the list above "
                    f"its images."
                )
            yield number, name, label


class _Kind(NamedTuple):
    """What the lines of a list are, and how path and identity are read; "" where they are not."""

    words: str
    columns: Callable[[str], tuple[str, str]]


def _kind_of(text: str) -> _Kind:
    words = text.split("\t")
    if len(words) >= 3 and words[0].isdecimal():
        if _number(words[1]):
            return _Kind(
                "number, label and path with tabs between them, as lists for mxnet's im2rec are",
                lambda text: _numbered(text, -1, 1),
            )
        if _number(words[2]):
            return _Kind(
                "0 or 1, path and label with tabs between them, as insightface's lists are",
                lambda text: _numbered(text, 1, 2),
            )
    return _Kind("the path of an image, a tab and its identity", _named)


def _named(text: str) -> tuple[str, str]:
    name, _, label = text.rpartition("\t" if "\t" in text else " ")
    return name.strip(), label.strip()


def _numbered(text: str, name: int, label: int) -> tuple[str, str]:
    words = text.split("\t")
    return (words[name].strip(), _number(words[label])) if len(words) >= 3 else ("", "")


def _number(word: str) -> str:
    """The whole number that a word is, which may have a fraction of zeros; else ""."""
    found = re.fullmatch(r"\s*(\d+)(?:\.0*)?\s*", word, re.ASCII)
    return found[1] if found else ""
