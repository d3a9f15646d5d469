"""What a search of the nearest centers takes on one core, and its memory.

    python tools/bench/neighbours.py --identities 1e5 --dim 64 --json OUT.json
    python tools/bench/neighbours.py --identities 1e6 --dim 512 --rows 1024,3072 --json OUT.json
    python tools/bench/neighbours.py --identities 8192 --against-fp32 5 --json OUT.json

With --rows only the first rows look, at all; the same loop does the rest. Numbers of them that
differ tell what one more row takes, and that, times all rows, is the whole search: the directions
of the rows that are looked at are made once, however many look. --against-fp32 searches all rows
with products in int8 and in fp32, in turns in this process. Seconds are those of the process on
its cores, so a machine that others use changes them little. Memory is what the process grows by
beyond the centers.

Shape suffixes: C = class centers, D = embedding.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from partialfc.distributed.ranks import Ranks
from partialfc.head import neighbours
from partialfc.head.neighbours import Rows, nearest_rows
from partialfc.writing import write_json
from tools.bench.conditions import conditions
from tools.bench.text import table

_BLOCK = 1 << 16


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    count, device = int(float(options.identities)), torch.device("cpu")
    rows = Rows(centers_CD=_centers(count, options.dim), dim=options.dim, of_rank=[range(count)])
    if options.against_fp32:
        return _against_fp32(rows, options)
    found: list[dict[str, Any]] = []
    for looking in [int(one) for one in options.rows.split(",")] if options.rows else [count]:
        before, started = _peak(), time.process_time()
        nearest_rows(rows, options.neighbours, Ranks(), device, first=looking)
        seconds = time.process_time() - started
        found.append({"rows": looking, "cpu_seconds": seconds, "extra_bytes": _peak() - before})
    record = {**conditions(), "identities": count, "dim": options.dim, "found": found}
    record["neighbours"] = options.neighbours
    record["whole_cpu_seconds"] = _whole(found, count)
    record["nanoseconds_of_a_score"] = record["whole_cpu_seconds"] / count**2 * 1e9
    if options.json:
        write_json(options.json, record)
    lines = [
        (f"{one['rows']:,}", f"{one['cpu_seconds']:.1f}", f"{one['extra_bytes'] / 2**20:.0f}")
        for one in found
    ]
    print(table(f"{count:,} identities, D = {options.dim}", ("rows", "CPU s", "MiB"), lines))
    print(f"all rows: {record['whole_cpu_seconds']:,.0f} s, ", end="")
    print(f"{record['nanoseconds_of_a_score']:.2f} ns a score")
    return 0


def _against_fp32(rows: Rows, options: argparse.Namespace) -> int:
    """Search in both formats of products, in turns; print the ratio and write the record."""
    if not neighbours._HAS_VNNI:
        raise SystemExit("--against-fp32: this CPU has no VNNI, so every search is in fp32.")
    count, turns = len(rows.centers_CD), []
    for _ in range(options.against_fp32):
        turn, lists = {}, []
        for name, has_vnni in (("int8", True), ("fp32", False)):
            neighbours._HAS_VNNI = has_vnni
            started = time.process_time()
            lists.append(nearest_rows(rows, options.neighbours, Ranks(), torch.device("cpu")))
            turn[name] = (time.process_time() - started) / count**2 * 1e9
        if not torch.equal(*lists):
            raise SystemExit("the lists of int8 and of fp32 differ.")
        turns.append(turn)
    record = {**conditions(), "identities": count, "dim": options.dim}
    record |= {"neighbours": options.neighbours, "nanoseconds_of_a_score": turns}
    record["times_as_fast"] = statistics.median(turn["fp32"] / turn["int8"] for turn in turns)
    if options.json:
        write_json(options.json, record)
    lines = [(f"{turn['int8']:.2f}", f"{turn['fp32']:.2f}") for turn in turns]
    print(table(f"ns a score, {count:,} identities, D = {options.dim}", ("int8", "fp32"), lines))
    print(f"int8 is {record['times_as_fast']:.2f} times as fast, with the same lists")
    return 0


def _centers(count: int, dim: int) -> torch.Tensor:
    centers = torch.empty(count, dim)
    generator = torch.Generator().manual_seed(0)
    for part in centers.split(_BLOCK):  # type: ignore[no-untyped-call]
        part.normal_(generator=generator)
    return centers


def _whole(found: list[dict[str, Any]], count: int) -> float:
    """Seconds of a search by all rows: those of the last one and of the rows that it lacks."""
    last = found[-1]
    if last["rows"] == count:
        return float(last["cpu_seconds"])
    first = found[0] if len(found) > 1 else {"rows": 0, "cpu_seconds": 0.0}
    of_a_row = (last["cpu_seconds"] - first["cpu_seconds"]) / (last["rows"] - first["rows"])
    return float(last["cpu_seconds"] + of_a_row * (count - last["rows"]))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", default="1e5", help="class centers (1e5)")
    parser.add_argument("--dim", type=int, default=512, help="length of an embedding (512)")
    parser.add_argument("--neighbours", type=int, default=16, help="of a list (16)")
    parser.add_argument("--rows", metavar="LIST", help="that look; all of them if left out")
    parser.add_argument(
        "--against-fp32", type=int, default=0, metavar="TURNS", help="compare products, so often"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
