"""Choose the shapes of the fused kernels' tiles, for the table partialfc/head/tiles/cards.py.

    python tools/bench/kernel_shapes.py --capability 90 --json OUT.json

It needs no GPU: a candidate is compiled for a card's capability. It is out if it spills registers,
or more than --spill bytes of a thread, or if it wants more shared or tensor memory than a program
may have. Of the others the one is chosen that should take the fewest clocks for a logit by
arithmetic (_kernels/clocks.py): candidates are compiled in that order until one fits. The last
lines are those of the table.
"""

import argparse
import heapq
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from partialfc.head import machine
from partialfc.head.tiles.cards import OTHERS, Card, Kernel, Shape
from partialfc.head.tiles.fused_kernels import width
from partialfc.head.tiles.limits import STATIONARY
from partialfc.writing import write_json
from tools.bench import compile_kernels
from tools.bench._kernels.clocks import clocks

Row = dict[str, Any]
Calls = list[Callable[[], object]]

CANDIDATES = [Shape(*each) for each in itertools.product((128, 64, 32, 16), (8, 4), (2, 3, 1))]
DIMS = (512, 500)
"""Of the columns of the table that fill a multiprocessor; the second with a mask."""
CARDS = {10 * card.capability[0] + card.capability[1]: card for card in OTHERS}

_REGISTERS = 255
"""Of a thread; what a program sums up, fp32 [64, D], must leave some of them."""
_WORST = (
    *("registers", "spill_bytes", "shared_bytes", "warps_per_sm"),
    *("tensor_memory_columns", "compile_seconds"),
)
_TENSOR_COLUMNS = 512
"""Of Blackwell's tensor memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, print the table and write the record; return the exit code."""
    options = _parser().parse_args(arguments)
    card = CARDS[options.capability]
    if options.shared_kib:
        card = replace(card, shared_bytes=options.shared_kib << 10)
    about = {
        "command": "python tools/bench/kernel_shapes.py " + " ".join(sys.argv[1:]),
        "target": f"sm_{options.capability}",
        "shared_bytes": card.shared_bytes,
        "versions": compile_kernels.versions(),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing from an earlier run
        compiled = compile_kernels.compile_only(options.capability)
        for kernel, dim in itertools.product(options.kernels.split(","), options.dims):
            for row in search(kernel, dim, card, compiled, options.spill):
                print(json.dumps(row), flush=True)
                rows.append(row)
            if options.json:  # after each: what is known is kept
                write_json(options.json, {**about, "tried": rows})
    for row in rows:
        if row["chosen"]:
            shape = ", ".join(str(row[name]) for name in ("streamed", "warps", "stages"))
            print(f"{row['kernel']:12} D = {row['dim']}: Shape({shape})")
    return 0


def search(kernel: Kernel, dim: int, card: Card, compiled: list[Any], spill: int) -> Iterator[Row]:
    """Compile candidates for a kernel, the fastest by arithmetic first, until one fits.

    Yields:
        Each with what the compiler made of it; the last one is chosen.
    """
    wide = width(dim)
    capability = 10 * card.capability[0] + card.capability[1]
    waiting: list[tuple[float, int, Row]] = []
    for place, shape in enumerate(CANDIDATES):
        kept = 0 if kernel == "update_kept" else STATIONARY
        least = (kept + shape.streamed * shape.stages) * wide * 2
        of_a_thread = STATIONARY * wide // (32 * shape.warps)
        if least <= card.shared_bytes and of_a_thread < _REGISTERS:
            programs = min(compile_kernels.SM_SHARED // (least + 1024), _REGISTERS // of_a_thread)
            waiting.append((clocks(kernel, shape, wide, capability, programs), place, {}))
    heapq.heapify(waiting)
    while waiting:
        _, place, row = heapq.heappop(waiting)
        if row:  # no other can be faster
            yield {**row, "chosen": True}
            return
        shape = CANDIDATES[place]
        row = {"kernel": kernel, "dim": dim, **asdict(shape)}
        row |= _compiled(kernel, dim, card, shape, compiled, spill)
        if row["fits"]:
            programs = max(1, row["warps_per_sm"] // shape.warps)
            row["clocks_a_logit"] = clocks(kernel, shape, wide, capability, programs)
            heapq.heappush(waiting, (row["clocks_a_logit"], place, row))
        else:
            yield {**row, "chosen": False}


def _compiled(
    kernel: Kernel, dim: int, card: Card, shape: Shape, compiled: list[Any], spill: int
) -> Row:
    """The worst of a kernel's variants; those behind one that does not fit are not compiled."""
    machine.ASSUMED = replace(card, shapes={kernel: (shape,) * 3})
    worst: Row = {}
    for call in VARIANTS[kernel](dim):
        before = sum(os.times()[:4])
        try:
            call()
        except Exception as error:  # the compiler's own: it has no room
            return {**worst, "fits": False, "why": f"{type(error).__name__}: {error}"[:200]}
        made = compiled.pop()
        spent = sum(os.times()[:4]) - before
        found = compile_kernels.resources(made)
        columns = int(getattr(made.metadata, "tmem_size", 0) or 0)
        found |= {"compile_seconds": round(spent, 2), "tensor_memory_columns": columns}
        found["warps_per_sm"] = -found["warps_per_sm"]
        worst = {name: max(worst.get(name, found[name]), found[name]) for name in _WORST}
        if worst["spill_bytes"] > spill or worst["shared_bytes"] > card.shared_bytes:
            break
        if columns > _TENSOR_COLUMNS:
            break
    else:
        return {**worst, "warps_per_sm": -worst["warps_per_sm"], "fits": True}
    return {**worst, "warps_per_sm": -worst["warps_per_sm"], "fits": False}


def _pulls(bend: str) -> Callable[[int], Calls]:
    more = (("n", "y"), ("y", "n"), ("n", "n"))
    return lambda dim: [compile_kernels._pull(dim, bend, *each)[2] for each in more]


def _updates(dim: int) -> Calls:
    made = compile_kernels._update(dim, "fp16", "int8", part="last")
    bent = compile_kernels._update(dim, "fp32", "fp32", bend="y", maximum="y", part="last")
    return [made[2], bent[2]]


VARIANTS: dict[Kernel, Callable[[int], Calls]] = {
    "pull": _pulls("n"),
    "pull_bent": _pulls("y"),
    "update": _updates,
    "update_kept": lambda dim: [
        compile_kernels._update(dim, "fp16", "int8", kept="y", part="last")[2]
    ],
}
"""Calls that compile what a kernel becomes, those that need most registers first."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, choices=CARDS)
    parser.add_argument("--kernels", default=",".join(get_args(Kernel)), help="with commas")
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS))
    parser.add_argument("--shared-kib", type=int, help="of a program (that of the card)")
    parser.add_argument("--spill", type=int, default=0, help="bytes of a thread that are allowed")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
