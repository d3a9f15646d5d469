"""Several sets of images as one data set, whose identities may be the same people.

Shape suffixes: N = samples, B = images asked for, b = those of one set, K = identities of an image,
P = packs, C = identities, the sets' one after the other, M = those of a file that maps them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from partialfc.data.dataset import DataSet, Part, most_of
from partialfc.data.identity_map import IdentityMap, numbering, read_identity_map
from partialfc.data.label_file import NONE

T = TypeVar("T")


class JoinedSets(DataSet):
    """Sets of images, one after the other: samples and identities are numbered on.

    An identity that a map says is one of a set before it has that one's number, and those behind
    it move up. Memory is that of the sets, and 8 bytes for each identity where there are maps.

    Args:
        sets: By name, in the order of their samples; at least two.
        maps: Of each set, files of :mod:`~partialfc.data.identity_map`.

    Raises:
        ValueError: If a pack is in two sets, or a map is not of its set and one before it.
        OSError: If a map cannot be read.
    """

    def __init__(self, sets: dict[str, DataSet], maps: dict[str, Sequence[Path]]) -> None:
        self._sets = sets
        super().__init__(
            [pack for one in sets.values() for pack in one.packs],
            [one.skipped_of(n) for one in sets.values() for n in range(len(one.packs))],
        )
        self._number_C, self._own = _numbered(sets, maps)

    @cached_property
    def _identity_start_P(self) -> NDArray[np.int64]:
        counts = [np.diff(one._identity_start_P) for one in self._sets.values()]
        return np.cumsum(np.concatenate([[0], *counts]))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sets, in order; their ranges of identities are contiguous."""
        starts = accumulate(map(len, self._sets.values()), initial=0)
        return tuple(
            Part(name, range(start, start + len(one)), own, one.most)
            for (name, one), start, own in zip(self._sets.items(), starts, self._own, strict=False)
        )

    @property
    def num_identities(self) -> int:
        """Number of identities of all sets, each counted once."""
        return self._own[-1].stop

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of those of the sets, in their order."""
        prints = " ".join(one.fingerprint for one in self._sets.values())
        return hashlib.blake2b(f"sets {prints}".encode(), digest_size=8).hexdigest()

    @cached_property
    def labels_fingerprint(self) -> str:
        """16 hexadecimal digits of the identities of the images, as they are numbered here."""
        prints = " ".join(one.labels_fingerprint for one in self._sets.values())
        digest = hashlib.blake2b(prints.encode(), digest_size=8)
        if self._number_C is not None:
            digest.update(self._number_C.astype("<i8").tobytes())
        return digest.hexdigest()

    def records(self, samples: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]] | str]:
        """Yield identity and JPEG bytes of each sample [B], or what is wrong with its record."""
        for found in super().records(samples):
            if self._number_C is None or isinstance(found, str) or self.labelled:
                yield found
            else:
                yield int(self._number_C[found[0]]), found[1]

    def identities(self, samples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the identities [B] of samples [B], in [0, num_identities); [B, K] of several."""
        if not self.labelled:
            return self._numbers(super().identities(samples))

        sets = [*self._sets.values()]
        starts = [*accumulate((one.num_identities for one in sets), initial=0)]

        def numbers(number: int, own_b: NDArray[np.int64]) -> NDArray[np.int64]:
            found = sets[number].identities(own_b)
            return np.where(found == NONE, NONE, self._numbers(found + starts[number]))

        return self._by_set(np.asarray(samples, np.int64), numbers, np.int64(NONE))

    def labels(self) -> NDArray[np.int64]:
        """Return the identities [N] of all samples."""
        if not self.labelled:
            return self._numbers(super().labels())
        for one in self._sets.values():
            one.labels()  # says why there are none
        return self.identities(np.arange(len(self)))

    def weights(self, samples: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return what each of :meth:`identities` counts for: 1 where the set does not say."""
        sets = [*self._sets.values()]
        if not any(one.own_labels is not None and one.own_labels.weighted for one in sets):
            return None

        def of_set(number: int, own_b: NDArray[np.int64]) -> NDArray[np.float32]:
            found = sets[number].weights(own_b)
            if found is None:
                found = (sets[number].identities(own_b) != NONE).astype(np.float32)
            return found

        return self._by_set(samples, of_set, np.float32(0))

    @property
    def labelled(self) -> bool:
        """Whether the identities of a set are not those of its packs."""
        return any(one.labelled for one in self._sets.values())

    @property
    def most(self) -> int | None:
        """K of the set that has most; ``None`` where each sample has one and no weight."""
        return most_of([one.most for one in self._sets.values()])

    def mapped_of(self, number: int) -> NDArray[np.int64]:
        """Return the identities that a set has in common with those before it, by maps."""
        if self._number_C is None:
            return np.empty(0, np.int64)
        starts = [*accumulate((one.num_identities for one in self._sets.values()), initial=0)]
        its_C, own = self._number_C[starts[number] : starts[number + 1]], self._own[number]
        return np.unique(its_C[(its_C < own.start) | (its_C >= own.stop)])

    def _by_set(
        self,
        sample_B: NDArray[np.int64],
        of_set: Callable[[int, NDArray[np.int64]], NDArray[Any]],
        filling: np.generic,
    ) -> NDArray[Any]:
        """What each set says of its samples, filled up to [B, K], or [B] where K is 1."""
        most = self.most or 1
        found_BK = np.full((len(sample_B), most), filling)
        for number, part in enumerate(self.parts):
            own_B = (sample_B >= part.samples.start) & (sample_B < part.samples.stop)
            row_b = of_set(number, sample_B[own_B] - part.samples.start)
            row_bK = row_b[:, None] if row_b.ndim == 1 else row_b
            found_BK[own_B, : row_bK.shape[1]] = row_bK
        return found_BK[:, 0] if most == 1 else found_BK

    def by_identity(self, of_packs: list[T]) -> list[T]:
        """Return what packs say of their identities [C], by identity: the first set's word."""
        if self._number_C is None:
            return of_packs
        _, first = np.unique(self._number_C, return_index=True)
        return [of_packs[place] for place in first.tolist()]

    def _numbers(self, identities: NDArray[np.int64]) -> NDArray[np.int64]:
        return identities if self._number_C is None else self._number_C[identities]


def _numbered(
    sets: dict[str, DataSet], maps: dict[str, Sequence[Path]]
) -> tuple[NDArray[np.int64] | None, tuple[range, ...]]:
    """The number [C] of each identity, ``None`` if each is its own, and those of each set."""
    number_of: dict[str, NDArray[np.int64]] = {}
    own, next_free = [], 0
    prints = {  # a map is of the identities of packs
        name: numbering(DataSet(one.packs))
        for name, one in sets.items()
        if any(maps.values()) and not one.labelled
    }
    for name, one in sets.items():
        number_C = np.full(one.num_identities, -1, np.int64)
        for path in maps[name]:
            found = read_identity_map(path)
            if found.of != prints.get(name):
                raise ValueError(
                    f"data.sets.{name}.map: {path}: it is of other images than this set, or they "
                    "have other identities now. Make it again with partialfc overlap."
                )
            before = [other for other in number_of if prints.get(other) == found.onto]
            if not before:
                raise ValueError(
                    f"data.sets.{name}.map: {path}: its second column is of no set above this one "
                    f"with the identities of its packs: {', '.join(number_of)}. Put that set "
                    "above, or make the map again with partialfc overlap."
                )
            _take(number_C, found, number_of[before[0]], f"data.sets.{name}.map: {path}")
        free = np.flatnonzero(number_C < 0)
        number_C[free] = next_free + np.arange(len(free))
        own.append(range(next_free, next_free + len(free)))
        next_free += len(free)
        number_of[name] = number_C
    changed = any(maps.values())
    return np.concatenate([*number_of.values()]) if changed else None, tuple(own)


def _take(
    number_C: NDArray[np.int64], found: IdentityMap, onto_C: NDArray[np.int64], where: str
) -> None:
    """Give identities of a set the numbers that their map says."""
    for column_M, count in ((found.identity_M, len(number_C)), (found.onto_M, len(onto_C))):
        if len(column_M) and column_M.max() >= count:
            raise ValueError(
                f"{where}: identity {column_M.max()} must be in [0, {count}), the identities of "
                "the set."
            )
    new_M, old_M = onto_C[found.onto_M], number_C[found.identity_M]
    other_M = np.flatnonzero((old_M >= 0) & (old_M != new_M))
    if len(other_M):
        raise ValueError(
            f"{where}: identity {found.identity_M[other_M[0]]} is one person by this map and "
            "another by the map before it. Remove it from one of them."
        )
    number_C[found.identity_M] = new_M
