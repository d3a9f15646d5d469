"""Who is found and who is not: the people of a pack, the pairs of a list, by name."""

# Shape suffixes: P = probes, C = identities.

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partialfc.data.names import Names
from partialfc.writing import atomic_write

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Person:
    """How the images of one identity were found.

    Attributes:
        identity: Its number in the pack.
        name: Its name, if the pack has names.
        probes: Images that were searched for.
        found: Those of them with rank 1.
        taken_for: Number of the identity that most of the others were taken for.
        taken_for_name: Its name.
    """

    identity: int
    name: str | None
    probes: int
    found: int
    taken_for: int | None
    taken_for_name: str | None

    @property
    def words(self) -> str:
        """For the table."""
        other = _called(self.taken_for, self.taken_for_name)
        most = f", taken for {other}" if self.taken_for is not None else ""
        return f"{_called(self.identity, self.name)} {self.found} of {self.probes}{most}"


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """One pair of a list: paths of its images, the truth, and the cosine."""

    first: str
    second: str
    same: bool
    cosine: float


def people_of(
    identity_P: np.ndarray, rank_P: np.ndarray, nearest_P: np.ndarray, names: Names | None
) -> list[Person]:
    """Return how every identity with probes was found, the least found first.

    Args:
        identity_P: The identity of each probe.
        rank_P: Its rank.
        nearest_P: The identity of the gallery entry next to it.
        names: Of all identities, if they have some.
    """
    found = []
    order = np.argsort(identity_P, kind="stable")
    some, start = np.unique(identity_P[order], return_index=True)
    for identity, probes in zip(some.tolist(), np.split(order, start[1:]), strict=True):
        others = nearest_P[probes][nearest_P[probes] != identity].tolist()
        other = Counter(others).most_common(1)[0][0] if others else None
        known = int((rank_P[probes] == 1).sum())
        name, as_name = _name(names, identity), _name(names, other)
        found.append(Person(identity, name, len(probes), known, other, as_name))
    return sorted(found, key=lambda one: one.found / one.probes)


def lines_of_people(people: Sequence[Person]) -> list[str]:
    """Return a line on those that are found least, if any image was not."""
    hard = [person.words for person in people[:_SHOWN] if person.found < person.probes]
    return [f"hardest: {'; '.join(hard)}"] if hard else []


def lines_of_pairs(pairs: Sequence[ScoredPair]) -> list[str]:
    """Return a line on the pairs of each kind that look least like it."""
    lines = []
    for same, words in ((True, "least alike of one person"), (False, "most alike of two people")):
        some = [pair for pair in pairs if pair.same is same]
        worst = sorted(some, key=lambda pair: pair.cosine, reverse=not same)[:_SHOWN]
        if worst:
            texts = (f"{pair.first} and {pair.second} {pair.cosine:.3f}" for pair in worst)
            lines.append(f"{words}: {'; '.join(texts)}")
    return lines


def write_people(path: Path, people: Mapping[str, Sequence[Person]]) -> None:
    """Write a line for every person of every set."""
    header = ["set", "identity", "name", "probes", "found", "taken_for", "taken_for_name"]
    _write(
        path,
        header,
        (
            (of, one.identity, one.name, one.probes, one.found, one.taken_for, one.taken_for_name)
            for of, some in people.items()
            for one in some
        ),
    )


def write_pairs(path: Path, pairs: Mapping[str, Sequence[ScoredPair]]) -> None:
    """Write a line for every pair of every list."""
    _write(
        path,
        ["set", "first", "second", "same", "cosine"],
        (
            (of, one.first, one.second, int(one.same), f"{one.cosine:.6f}")
            for of, some in pairs.items()
            for one in some
        ),
    )


def _write(path: Path, header: list[str], rows: Iterable[tuple[object, ...]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _name(names: Names | None, identity: int | None) -> str | None:
    return names[identity] if names is not None and identity is not None else None


def _called(identity: int | None, name: str | None) -> str:
    return str(identity) if name is None else f"{name} ({identity})"
