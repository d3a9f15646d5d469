"""Time and memory of the head against the textbook head, alternately in one run.

    python tools/bench/head.py --classes 100000 --batch 128 --rate 1,0.1 --json OUT.json
    python tools/bench/head.py --margins all --json OUT.json
    python tools/bench/head.py --plot OUT.png --from a.json b.json

A row is one full step: forward, backward to the embeddings' gradient, update of the centers; "3
GEMMs" are the matrix products of such a step alone, in caches, timed in the same turns. The
textbook head (tests/reference.py) is the algorithm of arcface_torch's PartialFC_V2: all logits in
fp32, a dense gradient, dense SGD. --margins compares ours with other margins instead, each against
a plain normalised softmax. Lists separated by commas give every combination. Under torchrun
its ranks are used; --world N starts N processes here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from partialfc.margins import MARGINS
from tools.bench.conditions import conditions
from tools.bench.head_plot import plot
from tools.bench.measure import TEXTBOOKS, Case

Row = dict[str, Any]

PLAIN = "normalized_softmax"
"""What a margin costs is told against it."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every combination, print the table and write the record."""
    options = _parser().parse_args(arguments)
    if options.plot:
        plot([json.loads(Path(path).read_text()) for path in options.records], options.plot)
        return 0
    world = int(os.environ.get("WORLD_SIZE", options.world))
    leads = int(os.environ.get("RANK", "0")) == 0
    cases = _cases(options, world)
    rows: list[Row] = []
    # One refresh a second: the bar shares the cores with what is measured.
    bar = Progress(console=Console(stderr=True), refresh_per_second=1, disable=not leads)
    with bar as progress:
        task = progress.add_task("measuring", total=sum(1 + len(case.heads) for case in cases))
        for number, case in enumerate(cases):
            row = {"world": world, **asdict(case)}
            found = _run(case, world, 2 * number)
            progress.advance(task)
            for name in case.heads:
                memory = replace(case, heads=(name,), memory=True)
                taken = _run(memory, world, 2 * number + 1)
                if leads:
                    found["heads"][name] |= taken
                progress.advance(task)
            if leads:
                rows.append(with_floors({**row, **found}))
                _save(options, rows)  # after each: the rows before a failure are kept
    if leads:
        console = Console()
        Console(width=max(console.width, 140)).print(table(rows))
    return 0


def _save(options: argparse.Namespace, rows: list[Row]) -> None:
    """Write the record so far, if one is wanted: the whole file or none."""
    if not options.json:
        return
    record = {**conditions(), "arguments": _plain(options), "rows": rows}
    out = Path(options.json)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out)


def with_floors(row: Row) -> Row:
    """Add what the machine's measured ceilings allow, and what fraction of it a head reaches.

    floor_seconds: four products of 2·B·n·D FLOP at the ceiling of the row's dtype.
    row_io_seconds: centers and states of the sampled rows read and written at the ceiling of a
    copy.
    """
    ceilings = row["ceilings"]
    for name, head in row["heads"].items():
        dtype = {"textbook": "fp32", "textbook_tf32": "tf32"}.get(name, row["dtype"])
        flop = 4 * 2 * row["batch"] * head["sampled_rows"] * row["dim"]
        stored = (head["centers_bytes"] + head["state_bytes"]) / row["classes"]
        head["floor_seconds"] = flop / ceilings.get(dtype, ceilings["fp32"])  # tf32 on a CPU
        head["row_io_seconds"] = 2 * stored * head["sampled_rows"] / ceilings["copy"]
        median = head["step_seconds"]["median"]
        head["fraction_of_floor"] = head["floor_seconds"] / median
        both = head["floor_seconds"] + head["row_io_seconds"]
        head["fraction_of_floor_and_row_io"] = both / median
    plain = row["heads"].get(PLAIN)
    for name, head in row["heads"].items() if plain else ():
        row[f"times_{PLAIN}_{name}"] = (
            head["step_seconds"]["median"] / plain["step_seconds"]["median"]
        )
    ours = row["heads"].get("ours")
    for name, head in row["heads"].items():
        if ours and name != "ours":
            medians = head["step_seconds"]["median"], ours["step_seconds"]["median"]
            row[f"times_faster_than_{name}"] = medians[0] / medians[1]
            # At a tiny size a step fits into what the process held before: no growth, no ratio.
            if ours["extra_peak_bytes"] > 0 and head["extra_peak_bytes"] > 0:
                row[f"memory_of_{name}"] = ours["extra_peak_bytes"] / head["extra_peak_bytes"]
    return row


def table(rows: list[Row]) -> Table:
    """Return the table of all rows: one line a head."""
    shown = Table(title="One step of the head; memory beyond centers and states, largest rank")
    for name in ("C", "B", "r", "W", "head", "median", "p10-p90", "against", "memory"):
        shown.add_column(name, justify="left" if name == "head" else "right")
    for name in ("4-GEMM floor", "of it", "row I/O", "3 GEMMs"):
        shown.add_column(name, justify="right")
    for row in rows:
        for name, head in row["heads"].items():
            times = head["step_seconds"]
            faster = row.get(f"times_faster_than_{name}", row.get(f"times_{PLAIN}_{name}"))
            shown.add_row(
                f"{row['classes']:,}",
                f"{row['batch']:,}",
                f"{row['rate']:g}",
                str(row["world"]),
                f"{name} {'' if name in TEXTBOOKS else row['dtype']}",
                f"{times['median'] * 1e3:.1f} ms",
                f"{times['p10'] * 1e3:.1f}-{times['p90'] * 1e3:.1f}",
                f"{faster:.2f} x" if faster else "",
                f"{head['extra_peak_bytes'] / 2**20:.0f} MiB",
                f"{head['floor_seconds'] * 1e3:.1f} ms",
                f"{head['fraction_of_floor']:.0%}",
                f"{head['row_io_seconds'] * 1e3:.1f} ms",
                f"{row['three_products_seconds']['median'] * 1e3:.1f} ms",
            )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", default="100000", help="C over all ranks; a list")
    parser.add_argument("--batch", default="128", help="global batch; a list")
    parser.add_argument("--dim", type=int, default=512, help="length of an embedding")
    parser.add_argument("--rate", default="1", help="sample rate in (0, 1]; a list")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "tf32"), help="of ours")
    parser.add_argument("--centers", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--momentum", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--world", type=int, default=1, help="processes to start")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of each rank; default: cores // ranks")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each head, at least")
    parser.add_argument("--seconds", type=float, default=5, help="and for as long, warm-up not in")
    parser.add_argument("--only", default="both", choices=("ours", "textbook", "both"))
    parser.add_argument("--margins", help="names of margins instead of these heads, or all")
    parser.add_argument("--json", metavar="OUT", help="write the record")
    parser.add_argument("--plot", metavar="OUT.png", help="draw records instead of measuring")
    parser.add_argument("--from", dest="records", nargs="+", default=[], metavar="JSON")
    return parser


def _cases(options: argparse.Namespace, world: int) -> list[Case]:
    textbooks = ("textbook", "textbook_tf32") if options.device == "cuda" else ("textbook",)
    heads = {"ours": ("ours",), "textbook": textbooks, "both": ("ours", *textbooks)}[options.only]
    if options.margins:
        names = MARGINS if options.margins == "all" else options.margins.split(",")
        if unknown := set(names) - set(MARGINS):
            raise SystemExit(f"--margins {', '.join(unknown)}: must be of {', '.join(MARGINS)}.")
        heads = (PLAIN, *(name for name in names if name != PLAIN))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    cases = []
    for classes, batch, rate in product(
        *(value.split(",") for value in (options.classes, options.batch, options.rate))
    ):
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
                device=options.device,
                heads=heads,
                threads=options.threads or max(1, (os.cpu_count() or 1) // local),
                steps=options.steps,
                seconds=options.seconds,
            )
        )
    return cases


def _run(case: Case, world: int, number: int) -> Row:
    """Run a case in fresh processes, one per rank; what rank 0 found, nothing on other ranks."""
    under_torchrun = "RANK" in os.environ
    ranks = [int(os.environ["RANK"])] if under_torchrun else range(world)
    port = int(os.environ["MASTER_PORT"]) + 1 + number if under_torchrun else _free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "tools/bench/measure.py"), json.dumps(asdict(case))]
        processes = [
            subprocess.Popen([*command, str(out)], env=_environment(rank, world, port, case))
            for rank in ranks
        ]
        codes = _wait(processes)
        if any(codes):
            raise SystemExit(f"a measuring process failed: exit codes {codes} of {case}")
        result: Row = json.loads(out.read_text()) if out.exists() else {}
        return result


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes; when one fails, or this process is interrupted, end the others."""
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.wait() for process in processes]


def _environment(rank: int, world: int, port: int, case: Case) -> dict[str, str]:
    defaults = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if "RANK" in os.environ:
        del defaults["GLOO_SOCKET_IFNAME"]
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    return {**defaults, **inherited, **own, "OMP_NUM_THREADS": str(case.threads)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("json", "plot", "records")
    return {name: value for name, value in vars(options).items() if name not in left_out}


if __name__ == "__main__":
    sys.exit(main())
