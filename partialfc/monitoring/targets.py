"""Where Prometheus finds the ranks of a run: one file of its file_sd format per run.

``file_sd_configs`` reads every file of a folder again when it changes. The file is written whole or
not at all, and removed when the run ends; after a ``kill -9`` it stays, and Prometheus sees a rank
that does not answer, as it should.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from partialfc.writing import write_text


class Target(NamedTuple):
    """Where one rank serves its numbers."""

    rank: int
    address: str
    scheme: str


def targets_path(folder: Path, run: Path) -> Path:
    """Return the file of a run in a folder of targets: the same for every start of the run."""
    name = re.sub(r"[^\w.-]", "_", run.name)
    return folder / f"partialfc-{name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}.json"


def write_targets(path: Path, addresses: Sequence[str], *, run: str, scheme: str) -> None:
    """Write the addresses of all ranks, rank by rank, each with its labels.

    Args:
        path: Of :func:`targets_path`.
        addresses: ``host:port`` by rank; "" for one that serves nothing.
        run: Name of the run.
        scheme: http or https.

    Raises:
        OSError: If it cannot be written.
    """
    entries = [
        {
            "targets": [address],
            "labels": {"run": run, "rank": str(rank), "__scheme__": scheme},
        }
        for rank, address in enumerate(addresses)
        if address
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(entries, indent=1) + "\n")


def read_targets(path: Path) -> list[Target]:
    """Return the ranks of a file of :func:`write_targets`; what is none is left out.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON.
    """
    targets = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        match entry:
            case {
                "targets": [str(address)],
                "labels": {"rank": str(rank), "__scheme__": "http" | "https" as scheme},
            } if rank.isdecimal() and re.fullmatch(r"[\w.:\[\]-]+", address):
                targets.append(Target(int(rank), address, scheme))
    return targets


def remove_targets(path: Path) -> None:
    """Remove the file of a run, if it is there."""
    path.unlink(missing_ok=True)
