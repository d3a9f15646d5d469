"""Who an identity is: names by number, which a data set numbered again would change in silence.

A pack has them beside it, in ``<pack>.identities.json``, a folder in the names of its folders; a
list, and a pack of somebody else's, have none.

Shape suffixes: C = identities, N = images.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from partialfc.data.dataset import DataSet
from partialfc.data.packs.pack import Pack
from partialfc.data.source import Source
from partialfc.data.tars.tar_images import TarImages
from partialfc.writing import read_text

NAMES = "identities.json"
_MOST_BYTES = 1 << 34

Names = list[str | None]
"""Of identities 0...C-1; ``None`` for one that nobody named."""


def names_file(head: str = "") -> str:
    """Return the name of the file of the names of one of several heads, in a run's folder."""
    return f"{head}.{NAMES}" if head else NAMES


def names_path(pack: Path) -> Path:
    """Return where the names of a pack are, if it has any."""
    return pack.with_suffix(f".{NAMES}")


def read_names(path: Path) -> Names:
    """Return the names of a file: a JSON list of texts, of numbers, which are taken as texts, or
    of nulls.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is none; the message names it.
    """
    try:
        found = json.loads(read_text(path, most=_MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}. It must be a JSON list of names.") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: it must be a JSON list of names.")
    for number, name in enumerate(found):
        if isinstance(name, bool) or not isinstance(name, str | int | None):
            raise ValueError(f"{path}: entry {number} must be a name, got {str(name)[:60]}.")
    return [None if name is None else str(name) for name in found]


def names_of(dataset: DataSet) -> Names | None:
    """Return the names [C] of all identities; ``None`` if a pack, a list or the labels have none.

    Raises:
        OSError: If a file of names cannot be read.
        ValueError: If it is none, or has not one for each identity.
    """
    if dataset.labelled:  # its identities are not those of the packs
        return None
    names: Names = []
    for source in dataset.packs:
        own = own_names(source)
        if own is None:
            return None
        names += own
    return dataset.by_identity(names)


def own_names(source: Source) -> Names | None:
    """Return the names [C] of the identities of one source, as :func:`names_of`."""
    if isinstance(source, Pack):
        path = names_path(source.path)
        if not path.exists():
            return None
        names = read_names(path)
        if len(names) != source.num_identities:
            raise ValueError(
                f"{path}: it has {len(names):,} names, and the pack {source.num_identities:,} "
                "identities. Remove it, or the pack is another one."
            )
        return names
    if isinstance(source, TarImages):
        return list(source.index.names)
    if not source.path.is_dir():
        return None
    index = source.index
    first_C = np.searchsorted(index.identity_N, np.arange(index.num_identities))
    return [index.name(image).split("/")[0] for image in first_C.tolist()]


def first_difference(names: Sequence[str | None], others: Sequence[str | None]) -> int | None:
    """Return the first identity that both name, and not the same; ``None`` if there is none."""
    for number, (name, other) in enumerate(zip(names, others, strict=False)):
        if name is not None and other is not None and name != other:
            return number
    return None
