"""Where shards are: a .tar, several by a pattern, a folder of them, on a disk or at a URL."""

import re
from pathlib import Path

from partialfc.data.files.index import is_hidden
from partialfc.definitions.urls import shown, url_of

SUFFIX = ".tar"

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1 << 20


def are_tars(path: Path) -> bool:
    """Whether there are shards at a path: a name that ends with .tar, a URL, or a folder of shards.

    A folder that has folders too is one of identities.
    """
    if url_of(path) or (path.suffix == SUFFIX and not path.is_dir()):
        return True
    return path.is_dir() and bool(_shards_in(path)) and not _has_folders(path)


def refuse_tars(path: Path) -> None:
    """Raise ValueError if there are shards at a path, for what reads none."""
    if are_tars(path):
        raise ValueError(
            f"{shown(path)}: tar shards, and what is at a URL, are for training, partialfc pack, "
            "convert and validate. Make a pack of them for everything else: partialfc convert pack."
        )


def shards_in_folder(path: Path) -> list[str]:
    """Return the shards of a folder on a disk, in the order of their names."""
    return [str(path / name) for name in _shards_in(path)]


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern with ranges as ``{0000..0012}`` stands for, in order.

    The first number says with how many digits all are written.

    Raises:
        ValueError: If a range falls, or there are too many names.
    """
    names = [pattern]
    while found := _RANGE.search(names[0]):
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MOST_SHARDS // len(names):
            raise ValueError(
                f"{pattern}: the range {found[0]} must not fall, and a pattern stands for at most "
                f"{_MOST_SHARDS:,} shards."
            )
        width = len(found[1])
        numbers = [f"{number:0{width}d}" for number in range(first, last + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    return names


def _shards_in(path: Path) -> list[str]:
    names = (file.name for file in path.glob(f"*{SUFFIX}"))
    return sorted(name for name in names if not is_hidden(name))


def _has_folders(path: Path) -> bool:
    return any(entry.is_dir() and not is_hidden(entry.name) for entry in path.iterdir())
