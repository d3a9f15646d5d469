"""What grows with ranks, hosts, images, identities and time, and what must not, simulated here.

    python tools/bench/growth.py --json OUT                    # all rows: a quarter of an hour
    python tools/bench/growth.py --rows flag,moves --json OUT  # some of them
    python tools/bench/growth.py --small                       # all of them in small

A row is measured at several sizes, from small to large, and the record is written after each of
them: figures that stay the same from one size to the next do not grow. Seconds are CPU time unless
the name says "wall", so a machine that others use changes them little. tests/scale counts most of
what is timed here.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from partialfc.writing import write_json
from tools.bench._growth.one_rank import (
    Found,
    folders,
    goodput,
    identities,
    index,
    month,
    moves,
    sums,
)
from tools.bench._growth.ranks import flag, names, parts, watchdog
from tools.bench.conditions import conditions


class Row(NamedTuple):
    """What is measured, at which sizes of what."""

    measure: Callable[[int, Path], Found]
    of: str
    sizes: tuple[int, ...]
    small: int


ROWS = {
    row.measure.__name__: row
    for row in (
        Row(watchdog, "ranks", (64, 1024, 2048, 4096), 16),
        Row(names, "connections", (16,), 2),
        Row(flag, "ranks", (32, 64, 128), 4),
        Row(parts, "ranks", (32, 1024), 8),
        Row(sums, "MiB", (1024,), 65),
        Row(goodput, "starts", (500, 2000, 10_000), 20),
        Row(month, "parts", (1, 45, 450), 2),
        Row(moves, "steps", (50_000, 200_000), 3000),
        Row(index, "records", (10**7, 10**8), 200_000),
        Row(folders, "folders", (10_000, 100_000), 100),
        Row(identities, "identities", (200_000, 1_600_000), 2000),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the record after every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--small", action="store_true", help="one small size of each")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    options = parser.parse_args(arguments)
    chosen = options.rows.split(",")
    if unknown := sorted({*chosen} - ROWS.keys()):
        parser.error(f"--rows: no row {', '.join(unknown)}; there are {', '.join(ROWS)}.")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    record: dict[str, Any] = {**conditions(), "rows": {}}
    for name in chosen:
        row, found = ROWS[name], record["rows"].setdefault(name, [])
        for size in (row.small,) if options.small else row.sizes:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found.append({row.of: size, **row.measure(size, Path(folder))})
                if options.json:  # before the folder is removed, which may take a while
                    write_json(options.json, record)
            words = (f"{what} {value:.4g}" for what, value in found[-1].items() if what != row.of)
            print(f"{name}, {size:,} {row.of}: {', '.join(words)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
