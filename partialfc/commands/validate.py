"""Check a pack, a folder or list of images, or tar shards, in levels, each with those before it.

index: keys and offsets are unique and aligned; records, in any order, fill the file. headers: the
magic, parts, length and label of each. labels: how many images the identities have. images: 30,000
at random are decoded (none bad: fewer than 0.01 % are, with 95 % confidence), and their statistics
hint at swapped channels and wrong crops. hash: SHA-256 of the file, kept for next time.

A folder of folders, a list, or tar shards, also at a URL, have the levels labels and images: all of
them are decoded, and what is no image by its name is counted.

Exit status: 0 the pack is sound, 1 it is not, 2 it cannot be checked. --bad writes the bad records
as a list that training leaves out: data.skip=LIST.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from partialfc.commands._command import command_parser
from partialfc.commands._validate import levels
from partialfc.cores import usable_cores
from partialfc.data.packs.pack import Pack
from partialfc.data.packs.recordio import RecordError
from partialfc.data.skip_list import write_skip_list
from partialfc.data.source import Source, labels_of, open_source
from partialfc.data.tars.store import ShardError
from partialfc.writing import write_json

LEVELS = ("index", "headers", "labels", "images", "hash")
SHOWN = 20
"""Bad records that are printed; --bad has all."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("validate", __doc__)
    parser.add_argument("pack", type=Path, help="a .rec file, a folder of folders or a list")
    parser.add_argument("--level", choices=LEVELS, default="images", help="the last one to check")
    parser.add_argument("--images", help="how many to decode, or all (30000; of files: all)")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--size", type=int, default=112, help="pixels that crops should have")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="threads")
    parser.add_argument("--bad", type=Path, help="write the bad records here, for data.skip")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--mean", type=Path, help="write the mean image here, a .png")
    options = parser.parse_args(arguments)
    return validate(options, Console(stderr=True, markup=False))


def validate(arguments: argparse.Namespace, console: Console) -> int:
    """Check the pack that the arguments name; return the exit status.

    Raises:
        ValueError: If an argument is out of range.
        OSError: If a file cannot be read or written.
    """
    workers = _whole("--workers", arguments.workers)
    try:
        pack = open_source(arguments.pack)
    except (RecordError, ShardError) as error:  # no record can be told from another
        print(f"bad: {error}")
        facts = {"pack": arguments.pack.name, "sound": False, "problem": str(error)}
        _write_report(arguments.json, facts)
        return 1
    wanted = arguments.images or ("30000" if isinstance(pack, Pack) else "all")
    count = sys.maxsize if wanted == "all" else _whole("--images", wanted)
    report = levels.Report()
    depth = LEVELS.index(arguments.level)
    if isinstance(pack, Pack):
        levels.index(pack, report)
        if depth >= LEVELS.index("headers"):
            levels.headers(pack, report, workers, console)
            if arguments.level == "headers":
                del report.levels["labels"]
    elif arguments.level in ("labels", "images"):
        levels.labels(np.bincount(labels_of(pack)), report)
    else:
        raise ValueError(
            f"--level {arguments.level}: a folder, list or shard has labels and images only."
        )
    if depth >= LEVELS.index("images"):
        look = levels.images(pack, report, workers, console, count, arguments.seed)
        report.hints += look.hints(arguments.size) if look.images else []
        if arguments.mean and look.images:
            look.save_mean(arguments.mean)
    if depth >= LEVELS.index("hash") and isinstance(pack, Pack):
        levels.file_hash(pack, report, console)
    show(pack, report)
    bad = [record._asdict() for record in report.bad.values()]
    facts = {
        "pack": pack.path.name,
        "fingerprint": pack.fingerprint,
        "sound": not bad,
        "levels": report.levels,
        "hints": report.hints,
        "bad": bad,
    }
    _write_report(arguments.json, facts)
    if arguments.bad:
        write_skip_list(arguments.bad, ((pack, record) for record in report.bad.values()))
    return 1 if bad else 0


def show(pack: Source, report: levels.Report) -> None:
    """Print the report."""
    table = Table("level", f"{pack.path} ({pack.fingerprint})", box=None, header_style="bold")
    for level, numbers in report.levels.items():
        for name, value in numbers.items():
            table.add_row(level, f"{name.replace('_', ' ')}: {_value(value)}")
            level = ""
    Console(soft_wrap=True, markup=False).print(table)
    for hint in report.hints:
        print(f"hint: {hint}")
    for record in list(report.bad.values())[:SHOWN]:
        print(f"bad: {record}")
    if len(report.bad) > SHOWN:
        print(f"and {len(report.bad) - SHOWN:,} more bad records: --bad LIST writes all of them")
    print("not sound" if report.bad else "sound")


def _whole(name: str, text: str | int) -> int:
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {text}.")
    return int(text)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, float) and 0 < value < 1e-2:
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _write_report(path: Path | None, facts: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, facts)
