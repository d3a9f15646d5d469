"""Lists of pairs of images: ours, with two paths a line, and LFW's, with names and numbers.

LFW's ``pairs.txt`` and ``pairsDevTest.txt`` (http://vis-www.cs.umass.edu/lfw/) begin with the
number of folds, where there are several, and of pairs of a kind in each. Lines of three words
(name, n, m) are pairs of one person, those of four (name, n, name, m) of two; image n of a person
is ``Name/Name_000n.jpg``.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from partialfc.data.sets.pairs import PairsError

ENDINGS = (".jpg", ".jpeg", ".png")
"""Of the files that a name and a number may stand for, the first that is there."""


class Pair(NamedTuple):
    """Two files, relative to the folder of images, and whether they show the same identity."""

    first: Path
    second: Path
    same: bool


def read_pair_list(path: Path, images: Path) -> list[Pair]:
    """Return the pairs of a list, its files as paths below ``images``.

    Args:
        path: Lines ``path<TAB>path<TAB>0 or 1``, or LFW's.
        images: The folder that the paths begin at; of LFW the one with a folder for each person.

    Raises:
        PairsError: If a line is not so, or names an image that is not there or no regular file.
        OSError: If the list cannot be read.
    """
    lines = list(words_of(path))
    if not lines:
        raise PairsError(f"{path}: it has no line, must have one for each pair.")
    is_lfw = len(lines[0][1]) < 3 and all(word.isdecimal() for word in lines[0][1])
    if not is_lfw:
        return [_pair(path, images, line, words) for line, words in lines]
    pairs = [_lfw_pair(path, images, line, words) for line, words in lines[1:]]
    promised = 2  # as many pairs of two persons as of one
    for word in lines[0][1]:
        promised *= int(word)
    if len(pairs) != promised:
        warnings.warn(
            f"{path}: its first line promises {promised:,} pairs, and it has {len(pairs):,}.",
            stacklevel=2,
        )
    return pairs


def words_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of every line that is not blank, by tabs if it has some.

    Raises:
        PairsError: If the list is no text in UTF-8.
        OSError: If it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    words = line.split("\t") if "\t" in line else line.split()
                    yield number, [word.strip() for word in words]
    except UnicodeError as error:
        raise PairsError(f"{path}: the list must be text in UTF-8: {error}.") from None


def image_of(images: Path, name: str, number: str) -> Path:
    """Return the file of image ``number`` of a person, ``Name/Name_0001.jpg``, below ``images``.

    Raises:
        ValueError: If the name leads out of the folder or the number is none; FileNotFoundError if
            there is no such file.
    """
    if not number.isdecimal() or not name or "/" in name or name in (".", ".."):
        raise ValueError(f"{name!r} {number!r} must be a person's name and the number of an image")
    stem = f"{name}/{name}_{int(number):04d}"
    for ending in ENDINGS:
        if (images / f"{stem}{ending}").is_file():
            return Path(f"{stem}{ending}")
    raise FileNotFoundError(f"{images / stem}.jpg is not there")


def _lfw_pair(path: Path, images: Path, line: int, words: list[str]) -> Pair:
    if len(words) not in (3, 4):
        raise _error(path, line, words, "must be name, n, m or name, n, name, m, as LFW's lists")
    name, n, *other = words
    try:
        first = image_of(images, name, n)
        second = image_of(images, *([name] if len(other) == 1 else []), *other)
    except ValueError as error:
        raise _error(path, line, words, str(error)) from None
    except FileNotFoundError as error:
        remedy = "name the folder that has a folder for each person with --images"
        raise _error(path, line, words, f"{error}: {remedy}") from None
    return Pair(first, second, len(other) == 1)


def _pair(path: Path, images: Path, line: int, words: list[str]) -> Pair:
    if len(words) != 3 or words[2] not in ("0", "1"):
        rule = "must be two paths and 0 or 1 (1: the same identity), with tabs between them"
        raise _error(path, line, words, rule)
    for word in words[:2]:
        if "\0" in word or not (images / word).is_file():
            raise _error(path, line, words, f"{images / word} is not there, or is no file")
    return Pair(Path(words[0]), Path(words[1]), words[2] == "1")


def _error(path: Path, line: int, words: list[str], problem: str) -> PairsError:
    return PairsError(f"{path}: line {line}: {' '.join(words)[:60]!r}: {problem}.")
