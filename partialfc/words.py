"""Numbers and names as people read them."""

import math
from collections.abc import Collection

_SHOWN = 8
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))


def duration(seconds: float) -> str:
    """Return e.g. ``0.25 s``, ``12 s``, ``3 min 20 s``, ``4 h 5 min`` or ``2 d 3 h``.

    A number that is not finite is ``?``.
    """
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for unit, length, smaller, part in _TIMES:
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{whole} s"


def rate(count: float) -> str:
    """Return how many a second, e.g. ``0.5``, ``12`` or ``6,480``."""
    return f"{count:,.0f}" if count >= 9.95 else f"{count:.2g}"


def size(count: float) -> str:
    """Return bytes in three digits, e.g. ``96 B``, ``1.5 GiB`` or ``252 GiB``."""
    unit = 0
    while count >= 1024 and unit < len(_BYTES) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_BYTES[unit]}" if count >= 100 else f"{count:.3g} {_BYTES[unit]}"


def names_of(ranks: Collection[int]) -> str:
    """Return ``rank 3`` or ``ranks 3, 4``; no more than eight of them."""
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:_SHOWN])
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"
