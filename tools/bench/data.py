"""How fast images reach a trainer: reader, loaders, cold disk, far store, memory, index.

    python tools/bench/data.py --json OUT            # about five minutes
    python tools/bench/data.py --parts index,memory --minutes 10 --json OUT

Each measurement runs in a process of its own and they take turns, so that a busy machine is busy
for all of them; the record has every round, and is written after each. One that fails fails alone,
and what a missing package would have measured is skipped. Packs are written to --folder first.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tools.bench._data.packs import (
    write_faces,
    write_files,
    write_huge,
    write_shards,
    write_sorted,
)
from tools.bench.conditions import conditions
from tools.bench.text import table

ROOT = Path(__file__).resolve().parents[2]

PARTS = ("loaders", "cold", "far", "memory", "index")
BATCH = 128
NEEDED = 7000
"""Images per second that an H200 takes with iresnet50."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="loaders,cold,index", help=f"of {','.join(PARTS)}")
    parser.add_argument("--threads", default="1,2", help="of the loaders")
    parser.add_argument("--images", type=int, default=30_000, help="in the pack of faces")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a measurement of speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the memory measurement")
    parser.add_argument("--latency", type=float, default=20.0, help="of the far store, in ms")
    parser.add_argument("--bandwidth", type=float, default=200.0, help="of it, in MiB/s")
    parser.add_argument("--folder", type=Path, help="for the packs; a temporary one")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts takes some of {', '.join(PARTS)}, got {options.parts}.")
    record = Record(options.json, {**conditions(), "batch": BATCH})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            record.put(part, globals()[part](options, folder, record))
    for missing in record.missing():
        print(f"not measured: {missing}")
    return int(any("(failed" in missing for missing in record.missing()))


class Record:
    """What is measured, written after every measurement."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self._found = path, about
        self._part: dict[str, list[dict[str, Any]]] = {}
        self._missing: dict[str, str] = {}

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keep one measurement of a row."""
        self._part.setdefault(name, []).append(found)
        for key in ("failed", "skipped"):
            if key in found:
                self._missing.setdefault(name, f"{name} ({key}: {found[key]})")
        self._write({"rows_so_far": self._part})

    def put(self, part: str, found: dict[str, Any]) -> None:
        """Keep a part that is whole."""
        self._found[part], self._part = found, {}
        self._write({})

    def missing(self) -> list[str]:
        """Return the rows without figures, and why."""
        return [*self._missing.values()]

    def _write(self, so_far: dict[str, Any]) -> None:
        if self._path is not None:
            whole = {**self._found, **so_far, "not_measured": self.missing()}
            self._path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def loaders(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, Any]:
    """Images per second of the reader, our loaders and DALI's own reader."""
    threads = [int(number) for number in options.threads.split(",")]
    base = {"pack": str(faces(options, folder)), "batch": BATCH, "seconds": options.seconds}
    rows: dict[str, dict[str, Any]] = {
        "reader alone": {"measure": "reader"},
        "reader alone, image files": {"measure": "reader", "pack": str(files(options, folder))},
    }
    for number in threads:
        rows |= {
            f"DALI, {number}": {"measure": "ours", "loader": "dali", "threads": number},
            f"DALI readers.mxnet, {number}": {"measure": "mxnet_reader", "threads": number},
            f"torch, simplejpeg, {number}": {
                "measure": "ours",
                "loader": "torch",
                "threads": number,
            },
            f"torch, Pillow, {number}": {"measure": "ours", "loader": "pillow", "threads": number},
            f"DataLoader, Pillow, {number}": {"measure": "ordinary", "threads": number},
        }
        if torch.cuda.is_available():
            rows[f"DALI mixed, {number}"] = {
                "measure": "ours", "loader": "dali", "threads": number, "device": "cuda",
            }  # fmt: skip
    measured = in_turns({name: base | row for name, row in rows.items()}, options.rounds, record)
    show("images/s", measured, ("images_per_second", "images_per_cpu_second"))
    first = (f"DALI, {threads[0]}", f"torch, simplejpeg, {threads[0]}")
    rates = [_median(measured[name], "images_per_cpu_second") for name in first]
    rate = next((rate for rate in rates if rate), None)
    if rate is None:
        return {"measured": measured}
    # Twice what is needed: half of the cores' time goes to the trainer's other work and to noise.
    advice = 2 * math.ceil(NEEDED / rate)
    print(f"threads per GPU for {NEEDED:,} images/s: {advice}")
    return {"measured": measured, "threads_per_gpu": advice}


def cold(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, Any]:
    """Images per second from a disk; pages are dropped by posix_fadvise(DONTNEED) before each."""
    pack = folder / f"sorted{options.images}.rec"
    if not pack.exists():
        write_sorted(pack, faces(options, folder))
    base = {
        "measure": "cold_epoch",
        "pack": str(pack),
        "batch": BATCH,
        # Of a large pack: read everywhere a little.
        "images": max(1, options.images // 8 // BATCH) * BATCH,
        "cold": True,
    }
    rows = {"shuffled": base, "blocks of 256": base | {"block": 256}}
    rows["image files, shuffled"] = base | {"pack": str(files(options, folder))}
    rows["shuffled, warm"] = base | {"cold": False}
    measured = in_turns(rows, options.rounds, record)
    show("from disk", measured, ("images_per_second", "disk_bytes_per_byte"))
    return measured


def far(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, Any]:
    """Images per second of shards at a store that lets every request wait, against a disk's."""
    pack, shards = faces(options, folder), folder / f"shards{options.images}"
    if not shards.exists():
        write_shards(pack, shards)
    store = {"latency": options.latency / 1000, "bandwidth": options.bandwidth * 2**20}
    base = {
        "measure": "ours", "batch": BATCH, "seconds": options.seconds, "loader": "torch",
        "threads": max(int(number) for number in options.threads.split(",")), "pack": str(shards),
    }  # fmt: skip
    there = base | {"pack": f"slow:/{shards.resolve()}", "store": store}
    rows: dict[str, dict[str, Any]] = {
        "pack, disk": base | {"pack": str(pack)},
        "shards, disk": base,
        "shards, store": there,
    }
    rows |= {f"shards, store, blocks of {n}": there | {"block": n} for n in (64, 256)}
    one(there | {"seconds": 0.1})  # makes the index
    measured = in_turns(rows, options.rounds, record)
    show("images/s", measured, ("images_per_second", "images_per_cpu_second"))
    medians = {name: _median(rounds, "images_per_second") for name, rounds in measured.items()}
    disk = medians["shards, disk"]
    ratios = {name: rate / disk for name, rate in medians.items() if rate and disk}
    print(", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    return {"store": store, "measured": measured, "ratio_to_shards_on_disk": ratios}


def memory(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, Any]:
    """Memory of both loaders over some minutes, at the same time."""
    base = {"pack": str(faces(options, folder)), "batch": BATCH, "seconds": options.minutes * 60}
    rows = [base | {"measure": "memory", "loader": name} for name in ("dali", "torch")]
    with ThreadPoolExecutor() as pool:
        measured = {
            row["loader"]: [found] for row, found in zip(rows, pool.map(one, rows), strict=True)
        }
    for name, (found,) in measured.items():
        record.add(name, found)
    show("memory", measured, ("mib", "growth"))
    return measured


def index(options: argparse.Namespace, folder: Path, record: Record) -> dict[str, Any]:
    """Open 42 million records, first from the .idx and then from the kept index."""
    if not (folder / "train.idx").exists():
        write_huge(folder)
    (folder / "train.rec.index").unlink(missing_ok=True)
    row = {"measure": "index", "folder": str(folder)}
    measured = in_turns({"from the .idx": row}, 1, record)
    measured |= in_turns({"kept": row}, options.rounds, record)
    show("index", measured, ("seconds", "shared_bytes_per_record", "own_bytes_per_record"))
    return measured


def faces(options: argparse.Namespace, folder: Path) -> Path:
    """Return the pack of faces, written if it is not there."""
    path = folder / f"faces{options.images}.rec"
    if not path.exists():
        write_faces(path, options.images)
    return path


def files(options: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of the same faces, written if it is not there."""
    path = folder / f"faces{options.images}"
    if not path.exists():
        write_files(faces(options, folder), path)
    return path


def in_turns(
    rows: dict[str, dict[str, Any]], rounds: int, record: Record
) -> dict[str, list[dict[str, Any]]]:
    """Measure every row once, then again, ``rounds`` times; what has failed is not tried again."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            if found[name] and not _measured(found[name]):
                continue
            found[name].append(one(row))
            record.add(name, found[name][-1])
            sys.stderr.write(f"{name}\n")
    return found


def one(row: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in a process; ``failed`` or ``skipped`` with the reason if it cannot."""
    if missing := _missing_package(row):
        return {"skipped": f"{missing} is not installed"}
    script = ROOT / "tools" / "bench" / "_data" / "measures.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(row)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"failed": next(iter(done.stderr.strip().splitlines()[-1:]), "its process died")}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _missing_package(row: dict[str, Any]) -> str | None:
    """Return what a row needs and this machine has not: torch's loader would use Pillow instead."""
    needs = {"dali": "nvidia.dali", "torch": "simplejpeg"}.get(row.get("loader", ""))
    if row["measure"] == "mxnet_reader":
        needs = "nvidia.dali"
    try:
        return needs if needs and importlib.util.find_spec(needs) is None else None
    except ModuleNotFoundError:  # not even what it is in
        return needs


def show(title: str, measured: dict[str, list[dict[str, Any]]], columns: tuple[str, ...]) -> None:
    """Print the medians."""
    names = (title, *(name.replace("_", " ") for name in columns))
    rows = [
        [name, *(_said(_median(rounds, column)) for column in columns)]
        for name, rounds in measured.items()
    ]
    print(table("", names, rows, left=(title,)))


def _measured(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in rounds if "failed" not in entry and "skipped" not in entry]


def _median(rounds: list[dict[str, Any]], column: str) -> float | None:
    values = [entry[column] for entry in _measured(rounds) if entry.get(column) is not None]
    return float(statistics.median(values)) if values else None


def _said(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
