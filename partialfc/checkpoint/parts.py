"""Names of a checkpoint's files, and which of them have which rows, by arithmetic.

What all ranks read is noted in the manifest. What one rank wrote for itself is a part: its note is
beside it, by that rank, with the checkpoint's mark in it. So a manifest is as long for 4,096 ranks
as for one, and who reads some rows opens the files that have them and no others.

    "parts": {"statistics": 768, "centers": {"": {"ranks": 768, "rows_per_identity": 1}}}

says that there are statistics_000000 to statistics_000767, and a file of centers for each of 768
ranks that has rows, cut by :class:`partialfc.head.sharding.Sharding`. Format 4, a copy in memory
and what ``partialfc identities`` writes have no parts: all their files are in the manifest.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

from partialfc.head.sharding import Sharding

ENDING = ".safetensors"
AVERAGE = "average."
"""Before the name of a statistic's average in a file of statistics."""
_MOST_RANKS = 1 << 20
_MOST_ROWS = 1 << 10
"""Of an identity."""


def statistics_of(rank: int) -> str:
    """The name, without its ending, of the file of a rank's own BatchNorm statistics."""
    return f"statistics_{rank:06d}"


def head_of(name: str) -> str:
    """The name, without its ending, of the file of what all ranks share of a head."""
    return f"head_{name}" if name else "head"


def centers_of(name: str, first: int | None = None) -> str:
    """The name, without its ending, of the file of a head's rows from one on; or its beginning."""
    begin = f"centers_{name}_" if name else "centers_"
    return begin if first is None else f"{begin}{first:010d}"


def is_part(file: str) -> bool:
    """Whether one rank writes a file for itself."""
    return file.startswith(("statistics_", "centers_"))


def parts_of(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all parts, in order."""
    parts = manifest.get("parts", {})
    for name in sorted(parts.get("centers", {})):
        for first in _firsts(manifest, name):
            yield centers_of(name, first) + ENDING
    for rank in range(parts.get("statistics", 0)):
        yield statistics_of(rank) + ENDING


def files_with_rows(manifest: Mapping[str, Any], name: str, rows: range) -> list[tuple[int, str]]:
    """Return the files that have some rows of a head, each with its first row, in order.

    Args:
        manifest: Of the checkpoint.
        name: Of the head, if it is one of several.
        rows: Of all identities, in the order of the identities.
    """
    begin = centers_of(name)
    digits = (
        file.removeprefix(begin).removesuffix(ENDING)
        for file in manifest["files"]
        if file.startswith(begin)
    )
    firsts = sorted([*map(int, filter(str.isdecimal, digits)), *_firsts(manifest, name)])
    low = max(0, bisect_right(firsts, rows.start) - 1)
    found = [first for first in firsts[low:] if first < rows.stop] if rows else []
    return [(first, centers_of(name, first) + ENDING) for first in found]


def _firsts(manifest: Mapping[str, Any], name: str) -> list[int]:
    """First rows of the parts of a head, ascending."""
    return [first for _, first in _owners(manifest, name)]


def _owners(manifest: Mapping[str, Any], name: str) -> Iterator[tuple[int, int]]:
    """Yield the ranks that have rows of a head, in order, each with its first row."""
    cut = manifest.get("parts", {}).get("centers", {}).get(name)
    if cut is None:
        return
    about = manifest.get("heads", {}).get(name, manifest)
    sharding = Sharding(
        num_identities=about["num_identities"],
        canonical_shards=about["canonical_shards"],
        world_size=cut["ranks"],
    )
    for rank in range(cut["ranks"]):
        if owned := sharding.owned(rank):
            yield rank, owned.start * cut["rows_per_identity"]


def writers(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the names of all parts, each with the rank that wrote it.

    Of a head that lies on some of the ranks, the manifest has the first of them in ``first_ranks``.
    """
    for name in manifest.get("parts", {}).get("centers", {}):
        first_rank = manifest.get("first_ranks", {}).get(name, 0)
        for rank, first in _owners(manifest, name):
            yield centers_of(name, first) + ENDING, first_rank + rank
    for rank in range(manifest.get("parts", {}).get("statistics", 0)):
        yield statistics_of(rank) + ENDING, rank


def misshapen(manifest: Mapping[str, Any]) -> str | None:
    """Return what is not as a commit writes it of the parts of a manifest, else ``None``."""
    parts = manifest.get("parts", {})
    if not isinstance(parts, dict) or not isinstance(parts.get("centers", {}), dict):
        return f"parts is {parts!r:.50}, must be an object"
    if not _is_count(parts.get("statistics", 0), 0, _MOST_RANKS):
        return f"parts has statistics of {parts['statistics']!r:.50} ranks"
    for name, cut in parts.get("centers", {}).items():
        about = manifest.get("heads", {}).get(name) if name else manifest
        cut = cut if isinstance(cut, dict) else {}
        if (
            about is None
            or about["num_identities"] < 1
            or not _is_count(cut.get("ranks"), 1, min(_MOST_RANKS, about["canonical_shards"]))
            or not _is_count(cut.get("rows_per_identity"), 1, _MOST_ROWS)
        ):
            return f"parts has centers of head {name[:80]!a} as {cut!r:.80}"
    if parts and not isinstance(manifest.get("mark"), str):
        return f"mark is {manifest.get('mark')!r:.50}, must be letters"
    return None


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
