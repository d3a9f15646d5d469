"""Lists of pairs of images: ours, with two paths a line, LFW's and CFP's.

LFW's ``pairs.txt`` and ``pairsDevTest.txt`` (http://vis-www.cs.umass.edu/lfw/) begin with the
number of folds, where there are several, and of pairs of a kind in each. Lines of three words
(name, n, m) are pairs of one person, those of four (name, n, name, m) of two; image n of a person
is ``Name/Name_000n.jpg``.

CFP's ``Protocol/Split/FF`` and ``FP`` (http://www.cfpw.io) are folders of folds, each with
``same.txt`` and ``diff.txt``. A line ``a,b`` is two numbers of images: the first in
``Protocol/Pair_list_F.txt``, the second there for FF and in ``Pair_list_P.txt`` for FP.
"""

import warnings
from collections.abc import Iterator
from itertools import chain
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


class MissingImageError(PairsError):
    """An image of a list is not there: no face was found in its photo, perhaps."""


Found = Pair | MissingImageError
Line = tuple[int, list[str]]
"""Number and words."""


def read_pair_list(path: Path, images: Path | None = None) -> tuple[Path, list[Pair]]:
    """Return the folder of images and the pairs of a list, in an order for ten folds.

    A pair with an image that is not there is left out, with one warning that counts them.

    Args:
        path: Lines ``path<TAB>path<TAB>0 or 1``, or LFW's; or CFP's folder of folds.
        images: The folder that the paths begin at (of the list); of LFW the one with a folder for
            each person, of CFP ``Data/Images`` or aligned ones, which it finds without a word.

    Raises:
        PairsError: If a line is not so, or the image of every pair is missing or no regular file.
        OSError: If the list cannot be read.
    """
    if path.is_dir():
        folder = images or path.parent.parent.parent / "Data" / "Images"
        found = list(_cfp_pairs(path, folder))
    else:
        folder = images or path.parent
        found = list(_listed_pairs(path, folder))
    pairs = [one for one in found if isinstance(one, Pair)]
    missing = [one for one in found if isinstance(one, MissingImageError)]
    if missing and not pairs:
        raise missing[0]
    if not pairs:
        raise PairsError(f"{path}: it has no pair, must have one a line.")
    if missing:
        warnings.warn(
            f"{path}: {len(missing):,} of {len(found):,} pairs have an image that is not "
            f"there, and are left out. The first: {missing[0]}",
            stacklevel=2,
        )
    return folder, pairs


def _listed_pairs(path: Path, images: Path) -> Iterator[Found]:
    lines = list(words_of(path))
    if not lines:
        raise PairsError(f"{path}: it has no line, must have one for each pair.")
    head = lines[0][1]
    if len(head) > 2 or not all(word.isdecimal() for word in head):
        yield from (_pair(path, images, line, words) for line, words in lines)
        return
    promised = 2  # as many pairs of two persons as of one
    for word in head:
        promised *= int(word)
    if len(lines) - 1 != promised:
        warnings.warn(
            f"{path}: its first line promises {promised:,} pairs, and it has {len(lines) - 1:,}.",
            stacklevel=3,
        )
    body = lines[1:]
    if len(head) == 1:  # all of one person, then all of two: no tenth would have both
        body = _in_turn(
            [line for line in body if len(line[1]) == 3],
            [line for line in body if len(line[1]) != 3],
        )
    yield from (_lfw_pair(path, images, line, words) for line, words in body)


def _in_turn(ones: list[Line], others: list[Line]) -> list[Line]:
    """One of each, and at the end what one of them has more."""
    both = min(len(ones), len(others))
    pairs = zip(ones[:both], others[:both], strict=True)
    return [*chain.from_iterable(pairs), *ones[both:], *others[both:]]


def _cfp_pairs(path: Path, images: Path) -> Iterator[Found]:
    folds = sorted(fold for fold in path.iterdir() if (fold / "same.txt").is_file())
    if not folds or path.name not in ("FF", "FP"):
        raise PairsError(f"{path}: it must be CFP's Protocol/Split/FF or FP, with its folds.")
    lists = path.parent.parent
    frontal = _cfp_images(lists / "Pair_list_F.txt")
    other = frontal if path.name == "FF" else _cfp_images(lists / "Pair_list_P.txt")
    for fold in folds:
        for name, same in (("same.txt", True), ("diff.txt", False)):
            for line, words in words_of(fold / name):
                numbers = " ".join(words).replace(",", " ").split()
                if len(numbers) != 2 or numbers[0] not in frontal or numbers[1] not in other:
                    rule = f"must be two numbers of images, a,b, of the lists in {lists}"
                    raise _error(fold / name, line, words, rule)
                try:
                    first = _file(images, frontal[numbers[0]])
                    yield Pair(first, _file(images, other[numbers[1]]), same)
                except FileNotFoundError as error:
                    yield MissingImageError(f"{fold / name}: line {line}: {error}.")


def _cfp_images(path: Path) -> dict[str, str]:
    """Number to path below ``Data/Images`` without its ending, as ``001/frontal/01``."""
    found = {}
    for line, words in words_of(path):
        number, *rest = " ".join(words).split(maxsplit=1)
        below = Path(*rest).parts[-3:]
        if len(below) != 3 or ".." in below or "\0" in str(rest):
            raise _error(
                path, line, words, "must be a number and ../Data/Images/001/frontal/01.jpg"
            )
        found[number] = Path(*below).with_suffix("").as_posix()
    return found


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
    return _file(images, stem)


def _file(images: Path, stem: str) -> Path:
    for ending in ENDINGS:
        if (images / f"{stem}{ending}").is_file():
            return Path(f"{stem}{ending}")
    raise FileNotFoundError(f"{images / stem}.jpg is not there")


def _lfw_pair(path: Path, images: Path, line: int, words: list[str]) -> Found:
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
        return MissingImageError(str(_error(path, line, words, f"{error}: {remedy}")))
    return Pair(first, second, len(other) == 1)


def _pair(path: Path, images: Path, line: int, words: list[str]) -> Found:
    if len(words) != 3 or words[2] not in ("0", "1"):
        rule = "must be two paths and 0 or 1 (1: the same identity), with tabs between them"
        raise _error(path, line, words, rule)
    for word in words[:2]:
        if "\0" in word or not (images / word).is_file():
            problem = f"{images / word} is not there, or is no file"
            return MissingImageError(str(_error(path, line, words, problem)))
    return Pair(Path(words[0]), Path(words[1]), words[2] == "1")


def _error(path: Path, line: int, words: list[str], problem: str) -> PairsError:
    return PairsError(f"{path}: line {line}: {' '.join(words)[:60]!r}: {problem}.")
