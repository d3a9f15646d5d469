"""Time and memory of the head against the textbook head, alternately in one run.

    python tools/bench/head.py --classes 100000 --batch 128 --rate 1,0.1 --json OUT.json
    python tools/bench/head.py --margins all --json OUT.json
    python tools/bench/head.py --positives 1,8 --rate 1,0.1 --json OUT.json
    python tools/bench/head.py --negatives uniform,weighted,nearest --rate 0.1 --json OUT.json
    python tools/bench/head.py --only ours --with stay --rate 0.1 --threads 1 --json OUT.json
    python tools/bench/head.py --device cuda --margin normalized_softmax --with all --json OUT.json
    python tools/bench/head.py --plot OUT.png --from a.json b.json

A row is one full step: forward, backward to the embeddings' gradient, update of the centers; "3
GEMMs" are the matrix products of such a step alone, in caches, timed in the same turns. The
textbook head (tests/support/reference.py) is the algorithm of arcface_torch's PartialFC_V2: all
logits in fp32, a dense gradient, dense SGD. --with adds what others publish for the same step at
rate 1 (_head/baselines.py, and _head/tensor_parallel.py on several ranks); what is not installed or
has no place is skipped with its reason; "stay" is ours again, whose unsampled rows stay, and the
record has the ratio of the two by CPU time. --margins compares ours with other margins instead,
each against a plain normalised softmax, and --positives rows of several identities: all in one
pass, and one pass for each in turn; --negatives what a sampled one counts for, and in the record
what a search of all neighbours takes, which no step has. Lists separated by commas give every
combination. Under torchrun its ranks are used; --world N starts N processes here, --world gpus one
for each GPU where there are several. A head that finds no memory fails alone and says how large a
card it needs, --budget ends in time, and the record is written after each head: it names what was
not measured.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

from partialfc.cores import usable_cores
from partialfc.head.options import NegativesName
from partialfc.margins import MARGINS
from partialfc.writing import write_json
from tools.bench._head.baselines import BASELINES
from tools.bench._head.expected import START, card_for, expected_seconds
from tools.bench._head.measure import NO_TIME, STAY, TEXTBOOKS, Case, several_heads
from tools.bench._head.processes import measured
from tools.bench._head.tensor_parallel import PARALLEL
from tools.bench.conditions import conditions
from tools.bench.text import table

Row = dict[str, Any]

PLAIN = "normalized_softmax"
"""What a margin costs is told against it."""

ONE_GPU = "several ranks: skipped: there are not several GPUs"

ONE = "K=1"
"""What several identities a row cost is told against it."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every combination, print the table and write the record."""
    options = _parser().parse_args(arguments)
    if options.plot:
        from tools.bench._head.plot import plot  # it needs matplotlib

        plot(
            [json.loads(Path(path).read_text(encoding="utf-8")) for path in options.records],
            options.plot,
        )
        return 0
    world = _world(options.world)
    if not world:
        sys.stderr.write(f"0 rows, about 0 s: {ONE_GPU}\n")
        if not options.dry_run:
            _save(options.json, {**conditions(), "arguments": _plain(options)}, [], [], ONE_GPU)
        return 0
    leads = int(os.environ.get("RANK", "0")) == 0
    cases = _cases(options, world)
    if options.device == "cuda" and leads:
        expected = START + sum(expected_seconds(case) for case in cases)
        sys.stderr.write(f"{len(cases)} rows, about {expected:.0f} s on an H200\n")
    if options.dry_run:
        return 0
    until = time.monotonic() + options.budget
    about = {**conditions(), "arguments": _plain(options)}  # now: it asks the GPU's driver
    rows: list[Row] = []
    row: Row | None = None
    try:
        for case, found in measured(cases, world, until):
            is_partial = found.get("partial", False)
            if case.device == "cpu" and not is_partial:
                _add_memory(case, found, world, until)
            row = with_floors({"world": world, **asdict(case), **found})
            row.pop("partial", None)
            if not is_partial:
                rows, row = [*rows, row], None
            if leads:  # after each head: what is measured is kept, whatever comes
                _save(options.json, about, [*rows, *([row] if row else [])], cases)
                _tell(case, found)
    except KeyboardInterrupt:  # by who gave it a time
        sys.stderr.write("interrupted\n")
    rows = [*rows, *([row] if row else [])]
    left = cases[len(rows) :]
    if leads:
        _save(options.json, about, rows, cases)
        print(shown(rows))
        for case in left:
            print(f"not measured, no time: {_named(asdict(case), case.heads)}")
    heads = [head for row in rows for head in row["heads"].values()]
    late = any("failed" in head or "not_measured" in head for head in heads)
    return int(late or bool(left) or row is not None)


def _world(wanted: str) -> int:
    """Return the number of ranks; 0 if it is that of the GPUs and there are not several."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if wanted == "gpus":
        count = torch.cuda.device_count()
        return count if count > 1 else 0
    if not wanted.isdigit() or int(wanted) < 1:
        raise SystemExit(f"--world {wanted}: must be a number >= 1, or gpus.")
    return int(wanted)


def _tell(case: Case, found: Row) -> None:
    """Say what was found last, on a line."""
    name, head = [*found["heads"].items()][-1]
    said = _missing(head) or f"{head['step_seconds']['median'] * 1e3:.1f} ms"
    sys.stderr.write(f"{_named(asdict(case), [name])}: {said}\n")


def _add_memory(case: Case, found: Row, world: int, until: float) -> None:
    """Take the peak of each head that was timed, in a fresh process."""
    for name in case.heads:
        if "step_seconds" in found["heads"][name]:
            alone = replace(case, heads=(name,), memory=True)
            for _, taken in measured([alone], world, max(until, time.monotonic() + 60)):
                found["heads"][name] |= taken.get("heads", {}).get(name, taken)


def _save(
    path: str | None, about: Row, rows: list[Row], cases: list[Case], *missing_too: str
) -> None:
    """Write the record so far, if one is wanted: the whole file or none."""
    if path is None:
        return
    missing = [*missing_too]
    for number, case in enumerate(cases):
        found = rows[number]["heads"] if number < len(rows) else {}
        absent = [name for name in case.heads if name not in found]
        whys = [(name, _missing(head)) for name, head in found.items()]
        missing += [f"{_named(asdict(case), [name])} ({why})" for name, why in whys if why]
        missing += [f"{_named(asdict(case), absent)} ({NO_TIME})"] if absent else []
    record = {**about, "rows": rows, "not_measured": missing}
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)


def _named(row: Row, heads: Sequence[str]) -> str:
    return f"C {row['classes']:,}, B {row['batch']:,}, r {row['rate']:g}: {', '.join(heads)}"


def with_floors(row: Row) -> Row:
    """Add what the machine's measured ceilings allow, and what fraction of it a head reaches.

    floor_seconds: four products of 2·B·n·D FLOP at the ceiling of the row's dtype.
    row_io_seconds: centers and states of the sampled rows read and written at the ceiling of a
    copy.
    """
    for name, head in row["heads"].items():
        if "out_of_memory" in head and row["device"] == "cuda":
            head["needs"] = card_for(name, row)
    heads: dict[str, Row] = {n: head for n, head in row["heads"].items() if "step_seconds" in head}
    for name, head in heads.items():
        ceilings = row["ceilings"]
        dtype = {"textbook": "fp32", "textbook_tf32": "tf32"}.get(name, row["dtype"])
        flop = 4 * 2 * row["batch"] * head["sampled_rows"] * row["dim"]
        stored = (head["centers_bytes"] + head["state_bytes"]) / row["classes"]
        head["floor_seconds"] = flop / ceilings.get(dtype, ceilings["fp32"])  # tf32 on a CPU
        head["row_io_seconds"] = 2 * stored * head["sampled_rows"] / ceilings["copy"]
        median = head["step_seconds"]["median"]
        head["fraction_of_floor"] = head["floor_seconds"] / median
        both = head["floor_seconds"] + head["row_io_seconds"]
        head["fraction_of_floor_and_row_io"] = both / median
    plain = next((name for name in (PLAIN, ONE) if name in heads), None)
    for name, head in heads.items():
        if plain:
            medians = head["step_seconds"]["median"], heads[plain]["step_seconds"]["median"]
            row[f"times_{plain}_{name}"] = medians[0] / medians[1]
    ours = heads.get("ours")
    for name, head in heads.items():
        if ours and name != "ours":
            medians = head["step_seconds"]["median"], ours["step_seconds"]["median"]
            row[f"times_faster_than_{name}"] = medians[0] / medians[1]
            if name == STAY and "step_cpu_seconds" in ours:
                cpu = (one["step_cpu_seconds"]["median"] for one in (ours, head))
                row["cpu_times_stay"] = next(cpu) / next(cpu)
            # At a tiny size a step fits into what the process held before: no growth, no ratio.
            extra = [one.get("extra_peak_bytes", 0) for one in (ours, head)]
            if min(extra) > 0:
                row[f"memory_of_{name}"] = extra[0] / extra[1]
    return row


def shown(rows: list[Row]) -> str:
    """Return the table of all rows: one line a head."""
    names = ("C", "B", "r", "W", "head", "median", "p10-p90", "against", "memory")
    floors = ("4-GEMM floor", "of it", "row I/O", "3 GEMMs")
    lines = [
        (
            f"{row['classes']:,}",
            f"{row['batch']:,}",
            f"{row['rate']:g}",
            str(row["world"]),
            _label(row, name),
            *_figures(row, name, head),
        )
        for row in rows
        for name, head in row["heads"].items()
    ]
    title = "One step of the head; memory beyond centers and states, largest rank"
    return table(title, (*names, *floors), lines, left=("head",))


def _label(row: Row, name: str) -> str:
    if name in TEXTBOOKS:
        return name
    tile = "" if row["tile_mib"] is None else f", tiles of {row['tile_mib']} MiB"
    return f"{name} {row['dtype']}{tile}"


def _missing(head: Row) -> str | None:
    """Return why a head has no figures, or ``None`` if it has."""
    if "step_seconds" in head:
        return None
    if "out_of_memory" in head:
        return "out of memory" + (f", needs {head['needs']}" if "needs" in head else "")
    for key, word in (("skipped", "skipped: "), ("not_measured", ""), ("failed", "failed: ")):
        if key in head:
            return f"{word}{head[key]}"
    return "failed"


def _figures(row: Row, name: str, head: Row) -> list[str]:
    missing = _missing(head)
    if missing:
        return [missing]
    times, extra = head["step_seconds"], head.get("extra_peak_bytes")
    ratios = (f"times_faster_than_{name}", f"times_{PLAIN}_{name}", f"times_{ONE}_{name}")
    faster = next((row[key] for key in ratios if key in row), None)
    return [
        f"{times['median'] * 1e3:.1f} ms",
        f"{times['p10'] * 1e3:.1f}-{times['p90'] * 1e3:.1f}",
        f"{faster:.2f} x" if faster else "",
        "?" if extra is None else f"{extra / 2**20:.0f} MiB",
        f"{head['floor_seconds'] * 1e3:.1f} ms",
        f"{head['fraction_of_floor']:.0%}",
        f"{head['row_io_seconds'] * 1e3:.1f} ms",
        f"{row['three_products_seconds']['median'] * 1e3:.1f} ms",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", default="100000", help="C over all ranks; a list")
    parser.add_argument("--batch", default="128", help="global batch; a list")
    parser.add_argument("--dim", type=int, default=512, help="length of an embedding")
    parser.add_argument("--rate", default="1", help="sample rate in (0, 1]; a list")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "tf32"), help="of ours")
    parser.add_argument("--centers", default="fp32", choices=("fp32", "bf16", "fp16", "fp8"))
    parser.add_argument("--momentum", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--unsampled", default="move", choices=("move", "stay"), help="of ours")
    parser.add_argument("--world", default="1", help="processes to start; gpus: one for each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of each rank; default: cores // ranks")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each head, at least")
    parser.add_argument("--seconds", type=float, default=5, help="and for as long, warm-up not in")
    parser.add_argument("--longest", type=float, metavar="S", help="of a head's steps, about")
    parser.add_argument("--only", default="both", choices=("ours", "textbook", "both"))
    parser.add_argument(
        "--margin", default="arcface", choices=("arcface", "normalized_softmax"), help="of all"
    )
    parser.add_argument(
        "--with",
        dest="others",
        metavar="NAMES",
        help=f"also {', '.join((*BASELINES, *PARALLEL))}; all; stay, of our unsampled rows",
    )
    parser.add_argument(
        "--passes", default="tiles", help="of ours: tiles, fused (kernels), or both"
    )
    parser.add_argument(
        "--tile-mib", metavar="MIB", help="size of our tiles instead of the usual one; a list"
    )
    parser.add_argument("--margins", help="names of margins instead of these heads, or all")
    parser.add_argument(
        "--positives", metavar="K", help="identities of a row instead of these heads; a list"
    )
    parser.add_argument(
        "--negatives",
        metavar="KIND",
        help="uniform, weighted, nearest instead of these heads; a list",
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="S", help="begin no row after S seconds"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how long it should take")
    parser.add_argument("--json", metavar="OUT", help="write the record")
    parser.add_argument("--plot", metavar="OUT.png", help="draw records instead of measuring")
    parser.add_argument("--from", dest="records", nargs="+", default=[], metavar="JSON")
    return parser


def _cases(options: argparse.Namespace, world: int) -> list[Case]:
    textbooks = TEXTBOOKS if options.device == "cuda" else TEXTBOOKS[:1]
    ours = tuple({"tiles": "ours"}.get(name, name) for name in options.passes.split(","))
    if not set(ours) <= {"ours", "fused"}:
        raise SystemExit(f"--passes {options.passes}: must be tiles, fused or both, with a comma.")
    heads = {"ours": ours, "textbook": textbooks, "both": (*ours, *textbooks)}[options.only]
    if options.others:
        every = (*BASELINES, *PARALLEL)
        others = every if options.others == "all" else tuple(options.others.split(","))
        if unknown := set(others) - {*every, STAY}:
            raise SystemExit(
                f"--with {', '.join(unknown)}: must be of {', '.join((*every, STAY))}."
            )
        heads = (*heads, *others)
    if options.margins:
        names = MARGINS if options.margins == "all" else options.margins.split(",")
        if unknown := set(names) - set(MARGINS):
            raise SystemExit(f"--margins {', '.join(unknown)}: must be of {', '.join(MARGINS)}.")
        heads = (PLAIN, *(name for name in names if name != PLAIN))
    if options.positives:
        if any(not one.isdigit() or int(one) < 1 for one in options.positives.split(",")):
            raise SystemExit(f"--positives {options.positives}: must be numbers >= 1, with commas.")
        heads = several_heads(options.positives)
    if options.negatives:
        heads = tuple(options.negatives.split(","))
        if set(heads) - set(get_args(NegativesName)):
            names = ", ".join(get_args(NegativesName))
            raise SystemExit(f"--negatives {options.negatives}: must be of {names}, with commas.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    cases = []
    tiles = [int(value) for value in options.tile_mib.split(",")] if options.tile_mib else [None]
    lists = (value.split(",") for value in (options.classes, options.batch, options.rate))
    for classes, batch, rate, tile_mib in product(*lists, tiles):
        if int(batch) < 1 or int(batch) % world:
            raise SystemExit(f"--batch {batch}: must be a multiple of the {world} ranks.")
        if not 0 < float(rate) <= 1:
            raise SystemExit(f"--rate {rate}: must be in (0, 1].")
        if int(classes) < world:
            raise SystemExit(f"--classes {classes}: each of the {world} ranks needs one.")
        cases.append(
            Case(
                classes=int(classes),
                batch=int(batch),
                dim=options.dim,
                rate=float(rate),
                dtype=options.dtype,
                centers=options.centers,
                momentum=options.momentum,
                unsampled=options.unsampled,
                device=options.device,
                heads=heads,
                threads=options.threads or max(1, usable_cores() // local),
                steps=options.steps,
                seconds=options.seconds,
                longest=options.longest,
                margin=options.margin,
                tile_mib=tile_mib,
            )
        )
    return cases


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("json", "plot", "records", "dry_run")
    plain = {name: value for name, value in vars(options).items() if name not in left_out}
    return {**plain, "budget": None if options.budget == math.inf else options.budget}


if __name__ == "__main__":
    sys.exit(main())
