"""Files that say which identities of one data set are those of another: text, a line for each.

```
0f3c5a7e90b1c2d3f4a5968778695a4b<TAB>5b1e6c0da4f7398201c3d5e7f9a1b2c4
17<TAB>4
```

The first line says of which data set the identities are, and of which those that they become; all
others have one of each, from 0, as the data sets number them. ``partialfc overlap`` writes such
files, and ``data.sets.NAME.map`` reads them.

Shape suffix: M = identities that the file has.
"""

import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from partialfc.writing import atomic_write, opened

if TYPE_CHECKING:  # it needs Pillow
    from partialfc.data.dataset import DataSet

_LONGEST_LINE = 80
_HEADER = re.compile(r"([0-9a-f]{32})\t([0-9a-f]{32})\n?")
_LINE = re.compile(r"([0-9]{1,18})\t([0-9]{1,18})\n?")


@dataclass(frozen=True, slots=True, eq=False)
class IdentityMap:
    """Which identities of a data set are those of another.

    Attributes:
        of: The data set whose identities are renumbered; see :func:`numbering`.
        onto: The one that has their new numbers.
        identity_M: int64, of the first, each once, ascending.
        onto_M: int64, of the second; several may be one.
    """

    of: str
    onto: str
    identity_M: NDArray[np.int64]
    onto_M: NDArray[np.int64]


def numbering(dataset: "DataSet") -> str:
    """Return 32 hexadecimal digits of the images of a data set and their identities.

    Args:
        dataset: Opened without a list of what to skip, on which no identity's number depends.
    """
    return dataset.fingerprint + dataset.labels_fingerprint


def write_identity_map(
    path: Path, pairs: Iterable[tuple[int, int]], *, of: "DataSet", onto: "DataSet"
) -> None:
    """Write a map, whole or not at all.

    Args:
        path: Replaced if it exists.
        pairs: An identity of ``of``, each once, and the one of ``onto`` that is the same person.
        of: Whose identities are renumbered; as :func:`numbering` takes it.
        onto: Which has their new numbers; the same.
    """
    with atomic_write(path) as partial, partial.open("w", encoding="ascii") as file:
        file.write(f"{numbering(of)}\t{numbering(onto)}\n")
        file.writelines(f"{identity}\t{other}\n" for identity, other in sorted(pairs))


def read_identity_map(path: Path) -> IdentityMap:
    """Return a map; 16 bytes of memory for each line.

    Raises:
        ValueError: If it is none, or has an identity twice; the message names file and line.
        OSError: If it cannot be read.
    """
    found = array("q")
    with os.fdopen(opened(path, os.O_RDONLY), encoding="ascii", errors="replace") as file:
        header = _HEADER.fullmatch(file.readline(_LONGEST_LINE))
        if header is None:
            raise ValueError(
                f"{path}: line 1: must be 32 hexadecimal digits, a tab and 32 more, which say of "
                "which data sets the identities are. partialfc overlap writes such files."
            )
        for number, text in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 2):
            line = _LINE.fullmatch(text)
            if line is None:
                raise ValueError(
                    f"{path}: line {number}: {text[:40]!r} must be an identity, a tab and the "
                    "identity of the other data set."
                )
            found.extend((int(line[1]), int(line[2])))
    pair_M2 = np.frombuffer(found, np.int64).reshape(-1, 2)
    pair_M2 = pair_M2[np.argsort(pair_M2[:, 0], kind="stable")]
    again_M = np.flatnonzero(pair_M2[1:, 0] == pair_M2[:-1, 0])
    if len(again_M):
        raise ValueError(
            f"{path}: identity {pair_M2[again_M[0], 0]} comes twice, and it can become one only."
        )
    return IdentityMap(header[1], header[2], pair_M2[:, 0].copy(), pair_M2[:, 1].copy())
