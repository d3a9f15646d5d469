"""Pairs of images of held-out people: half of them of one person, drawn by a key.

Everybody has the same say: people, and pairs of people, take turns, each with a pair of images that
it has not given yet. So a person with five hundred photos does not fill the list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path

import numpy as np

from partialfc.keyed import key, permute

Pair = tuple[Path, Path]
Encode = Callable[[Path], bytes]
_AT_ONCE = 1 << 16


def drawn_pairs(
    images: Mapping[str, Sequence[Path]], count: int, seed: int, encode: Encode
) -> tuple[list[Pair], dict[Path, bytes]]:
    """Return pairs, one person and two people in turn, and their images as JPEG files.

    In turn, so that each fold of a ten-fold protocol has as many of both. An image that cannot be
    read is in no pair: the next one is drawn.

    Args:
        images: Of each person; a function of their order, not of their paths.
        count: Pairs, even.
        seed: Of the choice.
        encode: Returns an image as a JPEG file, or raises anything.

    Raises:
        ValueError: If there are fewer pairs of a kind.
    """
    people = [list(some) for some in images.values()]
    jpegs: dict[Path, bytes] = {}
    broken: set[Path] = set()

    def usable(image: Path) -> bool:
        if image not in jpegs and image not in broken:
            try:
                jpegs[image] = encode(image)
            except Exception:  # decoders raise anything on broken files
                broken.add(image)
        return image in jpegs

    def some(pairs: Iterator[Pair], kind: str) -> list[Pair]:
        found: list[Pair] = []
        for left, right in pairs:
            if len(found) == count // 2:
                break
            if usable(left) and usable(right):
                found.append((left, right))
        if len(found) < count // 2:
            raise ValueError(
                f"--pairs {count}: half of them are of {kind}, and {len(people):,} held-out people "
                f"give {len(found):,} such pairs. Ask for {2 * len(found)}, or hold out more."
            )
        return found

    same = some(_of_one(people, seed), "one person")
    different = some(_of_two(people, seed), "two people")
    pairs = [pair for both in zip(same, different, strict=True) for pair in both]
    kept = {image for pair in pairs for image in pair}
    return pairs, {image: jpeg for image, jpeg in jpegs.items() if image in kept}


def _of_one(people: Sequence[Sequence[Path]], seed: int) -> Iterator[Pair]:
    several = [images for images in people if len(images) > 1]
    sizes = [len(images) * (len(images) - 1) // 2 for images in several]
    for person, pair in _in_turn(len(several), sizes.__getitem__, key(seed, "pairs of one")):
        left, right = _two_of(pair)
        yield several[person][left], several[person][right]


def _of_two(people: Sequence[Sequence[Path]], seed: int) -> Iterator[Pair]:
    def size(two: int) -> int:
        one, other = _two_of(two)
        return len(people[one]) * len(people[other])

    number = len(people) * (len(people) - 1) // 2
    for two, pair in _in_turn(number, size, key(seed, "pairs of two")):
        one, other = _two_of(two)
        left, right = divmod(pair, len(people[other]))
        yield people[one][left], people[other][right]


def _in_turn(groups: int, size: Callable[[int], int], secret: int) -> Iterator[tuple[int, int]]:
    """Yield (group, item of it), every item once: in each turn one of every group that has more."""
    turn, here = 0, _permuted(groups, secret)
    while True:
        more: list[int] = []
        for group in here:
            item = permute(np.array([turn]), size(group), key(secret, "item", group))
            yield group, int(item[0])
            if turn + 1 < size(group):
                more.append(group)
        if not more:
            return
        turn, here = turn + 1, iter(more)


def _permuted(count: int, secret: int) -> Iterator[int]:
    for start in range(0, count, _AT_ONCE):
        yield from permute(np.arange(start, min(start + _AT_ONCE, count)), count, secret).tolist()


def _two_of(number: int) -> tuple[int, int]:
    """The pair i < j of a number j (j - 1) / 2 + i."""
    larger = (1 + isqrt(1 + 8 * number)) // 2
    return number - larger * (larger - 1) // 2, larger
