"""Compile every variant of the Triton kernels for a card, without a GPU or a driver.

``python tools/bench/compile_kernels.py [--capability 100] [--only KERNELS] [--json OUT]`` prints
registers, spills and shared memory of each variant, and what its compiler took. It calls the launch
wrappers themselves with tensors on the CPU and stops every launch behind the compiler, so it
compiles what a launch on a GPU compiles. Exit code 1 if a variant spills registers.

Shape suffixes: B = rows of the gathered batch, C = rows of a shard, D = embedding, n = sampled
rows, P = positives, S = splits of a tile, T = rows of a tile.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from partialfc.head import machine
from partialfc.head.row_set import RowSet
from partialfc.head.rows import fused_kernels as fused_update_kernels
from partialfc.head.rows import kernels as row_kernels
from partialfc.head.rows.stored import (
    AT_STEP,
    CENTERS,
    MOMENTUM,
    SCALE,
    RoundingKeys,
    SgdStep,
    Stored,
)
from partialfc.head.tiles import fused, fused_kernels
from partialfc.head.tiles import triton_steps as kernels
from partialfc.head.tiles.cards import card_for
from partialfc.head.tiles.parts import Kept, Logits, MicroBatch
from partialfc.head.tiles.positives import Positives
from partialfc.margins import Bend

Row = dict[str, Any]
Variant = tuple[str, dict[str, str], Callable[[], object]]
"""Kernel, what sets the variant apart, and a call of its launch wrapper."""

CAPABILITY = {80: "A100", 90: "H100 and H200", 100: "B200", 103: "B300"}
KERNELS = ("unit_rows", "exponentials", "sgd_", "catch_up_", "pull_", "update_")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
DIMS = (128, 250, 512, 4096)
"""512 is compiled in every combination, the others in a few."""
EIGHT_BITS = ("fp8", "int8")
"""Centers and momentum, compiled in a few."""

_SM_REGISTERS, _SM_WARPS, _SM_BLOCKS, SM_SHARED = 65536, 64, 32, 228 * 1024


def main() -> int:
    """Compile, print a table and write the record; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(KERNELS), help="of them, with commas")
    parser.add_argument("--capability", type=int, default=90, choices=CAPABILITY)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table to OUT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing from an earlier run
        rows = compile_all(arguments.only.split(","), arguments.capability)
    if arguments.json:
        record = {
            "command": "python tools/bench/compile_kernels.py " + " ".join(sys.argv[1:]),
            "target": f"sm_{arguments.capability}",
            "versions": versions(),
            "kernels": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    spilling = [row for row in rows if row["spill_bytes"]]
    print(f"{len(rows)} variants, {len(spilling)} with spills")
    return bool(spilling)


def compile_all(only: Sequence[str], capability: int) -> list[Row]:
    """Compile all variants of some kernels, and print a line for each."""
    compiled = compile_only(capability)
    rows = []
    print(
        f"{'kernel':13} {'registers':>9} {'spills B':>8} {'shared B':>8} {'warps/SM':>8}  variant"
    )
    for name, variant, call in variants():
        if name not in only or (capability < 89 and "fp8" in variant.values()):
            continue  # which Triton does not read before Ada
        before = os.times()
        call()
        spent = sum(os.times()[:4]) - sum(before[:4])  # the assembler is a child
        row = {"kernel": name, **variant, **resources(compiled.pop()), "compile_seconds": spent}
        rows.append(row)
        print(
            f"{name:13} {row['registers']:9} {row['spill_bytes']:8} {row['shared_bytes']:8} "
            f"{row['warps_per_sm']:8}  " + " ".join(f"{k}={v}" for k, v in variant.items())
        )
    return rows


def compile_only(capability: int = 90) -> list[Any]:
    """From now on launch nothing in this process; return the list that gets what launches compile.

    A launch that needs no compiling adds the kernel that it would use.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def stop_behind_compiler(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = stop_behind_compiler
    driver.set_active(_NoDriver(capability))
    machine.ASSUMED = card_for(divmod(capability, 10))
    return compiled


def variants() -> Iterator[Variant]:
    """Every combination that the wrappers tell apart."""
    for centers, unit, rows in itertools.product(("fp32", "bf16", "fp16"), ("fp32", "bf16"), "yn"):
        yield _unit_rows(centers, unit, rows, 512)
    for dim in DIMS:
        yield _unit_rows("fp16", "bf16", "y", dim)
    yield _unit_rows("fp8", "bf16", "y", 512)
    for logit, exp, bend, shift, sums in itertools.product(
        ("fp32", "bf16"), ("fp32", "bf16"), "yn", "yn", "yn"
    ):
        yield _exponentials(logit, exp, bend, shift, sums, 4096)
    yield _exponentials("bf16", "bf16", "n", "n", "y", 1000)
    for centers, momentum, embedding, rows in itertools.product(
        ("fp32", "bf16", "fp16"), ("no", "fp32", "bf16", "int8"), ("fp32", "bf16"), "yn"
    ):
        yield _sgd(centers, momentum, embedding, rows, 512)
    for dim in DIMS:
        yield _sgd("fp32", "fp32", "fp32", "y", dim)
        yield _sgd("fp16", "int8", "bf16", "y", dim)
    for centers, momentum in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "int8"), EIGHT_BITS):
        yield _sgd(centers, momentum, "bf16", "compact", 512)
    for centers, momentum in itertools.product(
        ("fp32", "bf16", "fp16"), ("no", "fp32", "bf16", "int8")
    ):
        yield _catch_up(centers, momentum, "y", 512)
    for rows, dim in (("n", 512), ("compact", 512), *(("y", dim) for dim in DIMS if dim != 512)):
        yield _catch_up("fp32", "fp32", rows, dim)
        yield _catch_up("fp16", "int8", rows, dim)
    yield _catch_up(*EIGHT_BITS, "y", 512)
    for dim, bend, maximum, kept in itertools.product((128, 500, 512), "ny", "ny", "ny"):
        if "y" not in (maximum, kept) or maximum != kept:
            yield _pull(dim, bend, maximum, kept)
    for centers, momentum in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "int8"), EIGHT_BITS):
        for kept in "yn":
            yield _update(512, centers, momentum, kept=kept)
        yield _update(512, centers, momentum, part="last")
    for dim in (128, 500):
        yield _update(dim, "fp16", "int8")
    yield _update(512, "fp32", "no", bend="y", maximum="y")
    yield _update(512, "fp32", "fp32", part="first")


def _unit_rows(centers: str, unit: str, rows: str, dim: int) -> Variant:
    def call() -> None:
        centers_CD = torch.empty(32, dim, dtype=DTYPES[centers])
        rows_n = torch.arange(16) if rows == "y" else None
        return kernels.unit_rows(
            centers_CD, rows_n, 0, 16, torch.empty(16, dim, dtype=DTYPES[unit])
        )

    return "unit_rows", {"centers": centers, "unit": unit, "rows": rows, "dim": str(dim)}, call


def _exponentials(logit: str, exp: str, bend: str, shift: str, sums: str, columns: int) -> Variant:
    def call() -> object:
        return kernels.exponentials(
            torch.empty(16, columns, dtype=DTYPES[logit]),
            torch.zeros(1, columns, dtype=torch.int64),
            bend=Bend(torch.zeros(columns), torch.zeros(3)) if bend == "y" else None,
            shift_B=torch.zeros(columns) if shift == "y" else None,
            sum_B=torch.zeros(columns) if sums == "y" else None,
            dtype=DTYPES[exp],
        )

    variant = {"logit": logit, "exp": exp, "bend": bend, "shift": shift, "sum": sums}
    return "exponentials", {**variant, "B": str(columns)}, call


def _sgd(centers: str, momentum: str, embedding: str, rows: str, dim: int) -> Variant:
    def call() -> object:
        row_kernels.sgd_(
            _stored(centers, momentum, rows, dim),
            0,
            16,
            torch.empty(16, dim),
            _positives(torch.empty(8, dim, dtype=DTYPES[embedding])),
            torch.zeros(17, dtype=torch.int64),
            _STEP,
        )
        return None

    variant = {"centers": centers, "momentum": momentum, "embedding": embedding, "rows": rows}
    return "sgd_", {**variant, "dim": str(dim)}, call


def _catch_up(centers: str, momentum: str, rows: str, dim: int) -> Variant:
    def call() -> object:
        stored = _stored(centers, momentum, rows, dim)
        stored.states[AT_STEP] = torch.zeros(32, 1, dtype=torch.int32)
        row_kernels.catch_up_(
            stored, torch.zeros(3, 2, 2, dtype=torch.float64), 0, RoundingKeys(1 << 60, 1 << 61)
        )
        return None

    variant = {"centers": centers, "momentum": momentum, "rows": rows, "dim": str(dim)}
    return "catch_up_", variant, call


def _pull(dim: int, bend: str, maximum: str, kept: str) -> Variant:
    def call() -> object:
        splits = fused.splits_of(64, machine.card_of(None))
        fused_kernels.pull_(
            torch.empty(64, dim, dtype=torch.bfloat16),
            torch.empty(64, dim, dtype=torch.bfloat16),
            torch.zeros(64, dtype=torch.int64),
            scale=64.0,
            bend=_bend(bend),
            sum_SB=torch.empty(splits, 64),
            maximum_SB=torch.empty(splits, 64) if maximum == "y" else None,
            pull_SBD=torch.empty(splits, 64, dim),
            exp_TB=torch.empty(64, 64, dtype=torch.bfloat16) if kept == "y" else None,
        )
        return None

    return "pull_", {"bend": bend, "maximum": maximum, "kept": kept, "dim": str(dim)}, call


def _update(
    dim: int,
    centers: str,
    momentum: str,
    *,
    bend: str = "n",
    maximum: str = "n",
    kept: str = "n",
    part: str = "only",
) -> Variant:
    """``part``: which of the micro-batches; all but the only one have label smoothing."""

    def call() -> object:
        bf16, number_B = torch.empty(64, dim, dtype=torch.bfloat16), torch.arange(64)
        one = Kept(
            query_BD=bf16,
            row_n=number_B,
            target_P=number_B,
            logits=Logits(64.0, unit=True, largest=64.0, compute="bf16", bend=_bend(bend)),
            maximum_B=torch.zeros(64) if maximum == "y" else None,
            negative_B=torch.zeros(64),
            positive_P=torch.zeros(64),
            positive_BD=bf16,
            even_D=None if part == "only" else torch.zeros(dim),
            exponentials=[],
        )
        present_n = None if part == "only" else torch.ones(64, dtype=torch.bool)
        fused_update_kernels.update_(
            _stored(centers, momentum, "y", dim, count=64, sampled=64),
            MicroBatch(one, one.logits, number_B, present_n),
            fused_update_kernels.TileGradient(
                start=0,
                stop=64,
                key_TD=None if kept == "y" else bf16,
                exp_TB=torch.empty(64, 64, dtype=torch.bfloat16) if kept == "y" else None,
                gradient_TD=torch.empty(64, dim),
                earlier_TD=torch.empty(64, dim) if part == "last" else None,
                last=part in ("only", "last"),
            ),
            _positives(bf16),
            torch.zeros(65, dtype=torch.int64),
            _STEP,
        )
        return None

    variant = {"centers": centers, "momentum": momentum, "bend": bend, "maximum": maximum}
    return "update_", {**variant, "kept": kept, "part": part, "dim": str(dim)}, call


_STEP = SgdStep(
    lr=0.1,
    weight_decay=5e-4,
    momentum=0.9,
    keys=RoundingKeys(1 << 60, 1 << 61),
    skip=torch.tensor(False),
)


def _stored(
    centers: str, momentum: str, rows: str, dim: int, *, count: int = 32, sampled: int = 16
) -> Stored:
    """Rows of a shard of ``count``; ``rows``: ``n`` for all, ``compact`` or anything for some."""
    states = {}
    if centers in ("fp16", "fp8"):
        states[CENTERS + SCALE] = torch.ones(count, 1)
    if momentum != "no":
        states[MOMENTUM] = torch.empty(count, dim, dtype=DTYPES[momentum])
    if momentum == "int8":
        states[MOMENTUM + SCALE] = torch.ones(count, 1)
    row_n = None if rows == "n" else torch.arange(sampled)
    row_set = RowSet.of(row_n, compact=rows == "compact")
    return Stored(torch.empty(count, dim, dtype=DTYPES[centers]), states, row_set)


def _positives(embedding_PD: torch.Tensor) -> Positives:
    number_P = torch.arange(len(embedding_PD))
    return Positives(number_P, number_P, torch.zeros(len(embedding_PD)), embedding_PD)


def _bend(bend: str) -> Bend | None:
    return Bend(torch.zeros(64), torch.zeros(3)) if bend == "y" else None


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ptxas": _nvidia("ptxas", "--version").split("release ")[-1].split(",")[0],
    }


def resources(kernel: Any) -> Row:
    """What cubin and PTX say of themselves, and how many warps an SM holds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _nvidia("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    warps = int(kernel.metadata.num_warps)
    shared = max(shared, int(kernel.metadata.shared))
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256
    blocks = min(_SM_BLOCKS, _SM_WARPS // warps, _SM_REGISTERS // (per_warp * warps))
    blocks = min(blocks, SM_SHARED // (shared + 1024))  # the system keeps 1 KiB a block
    ptx, gpu = kernel.asm["ptx"], kernel.asm["ttgir"]
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": shared,
        "warps": warps,
        "warps_per_sm": blocks * warps,
        "bf16_rounding": sorted(set(re.findall(r"cvt\.(r\w)\.bf16(?:x2)?\.f32", ptx))),
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        "mma_warps": sorted(set(re.findall(r"warpsPerCTA = \[(\d+, \d+)\], instr", gpu))),
        "atomics": len(re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", ptx, re.MULTILINE)),
    }


def _nvidia(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class _NoDriver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


if __name__ == "__main__":
    sys.exit(main())
