"""URLs where a path may stand: of images that are read from a store.

Settings and arguments are paths, and a path has one slash where a URL has two: ``s3://b/x`` is kept
as ``Path("s3:/b/x")``, which no path on a disk is, and :func:`url_of` gives the URL back.
"""

import re
from pathlib import Path

# A scheme of two letters at least, as c:/ is none; several as in simplecache::s3://.
_URL = re.compile(r"[A-Za-z][\w+.-]+(::[A-Za-z][\w+.-]+)*:/")
_ON_DISKS = ("file", "local")
"""Schemes that a path from the root follows: three slashes."""


def url_of(path: Path) -> str | None:
    """Return the URL that a path is, ``None`` of a path on a disk."""
    text = str(path)
    return re.sub(r"(\w+):/+", _with_slashes, text) if _URL.match(text) else None


def _with_slashes(found: re.Match[str]) -> str:
    return f"{found[1]}:///" if found[1] in _ON_DISKS else f"{found[1]}://"


def shown(path: Path) -> str:
    """Return a path as its user wrote it."""
    return url_of(path) or str(path)
