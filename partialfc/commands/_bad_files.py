"""Files that a command leaves out: those that cannot be used, and those that are no images.

The first are told, counted, listed by ``--bad`` and change the exit status; the rest is done. The
others, by the ends of their names, are counted.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from partialfc.data.files.index import is_hidden
from partialfc.writing import write_text

HELP = "write the files that were left out here, with the reasons (JSON Lines)"
"""Of the option ``--bad``."""

_SHOWN = 20
_ENDS = 8


class Fault(NamedTuple):
    """A file or folder that cannot be used, and why."""

    path: str
    why: str


def tell_faults(faults: Sequence[Fault], listed: Path | None) -> None:
    """Print what was left out to stderr, the first of many, and write all of it to a list.

    A line of the list is ``{"file": path, "problem": why}``; there are none if nothing is bad.
    """
    shown = [(repr(path)[1:-1], why) for path, why in faults]  # as a terminal can take it
    if listed is not None:
        lines = (
            json.dumps({"file": path, "problem": why}, ensure_ascii=False) for path, why in shown
        )
        write_text(listed, "".join(line + "\n" for line in lines))
    for path, why in shown[:_SHOWN]:
        print(f"left out: {path}: {why}", file=sys.stderr)
    more = "" if len(faults) <= _SHOWN else f"; the first {_SHOWN} are above"
    if faults:
        where = f"all are in {listed}" if listed else "--bad FILE lists all"
        print(
            f"{len(faults):,} left out because they cannot be used{more}; {where}.", file=sys.stderr
        )


def reason_of(error: Exception) -> str:
    """Return what made a file unusable, without its name, which stands before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def ends_in_words(ends: Counter[str]) -> str:
    """Return how many files are no images by their names, and the ends of these; "" for none."""
    if not ends:
        return ""
    common = ", ".join(f"{end} {count:,}" for end, count in ends.most_common(_ENDS))
    return f"{ends.total():,} that are no images by their names were left out: {common}"


def end_of(name: str) -> str:
    """Return the end of a name, or all of one that has none, in small letters; or "hidden"."""
    return "hidden" if is_hidden(name) else Path(name).suffix.lower() or Path(name).name
