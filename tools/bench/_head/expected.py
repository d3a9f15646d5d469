"""What a case of tools/bench/head.py should take on an H200, and on which card it finds room.

Rates are those of partialfc estimate; the textbook head's bytes are counted.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from partialfc.commands._estimate.gpus import GPUS, HEAD_SHARE, MEMORY, PRODUCTS
from partialfc.head.tiles.passes import TILE_BYTES
from tools.bench._head.baselines import BASELINES
from tools.bench._head.measure import TEXTBOOKS, WARM_UP, Case, positives_of
from tools.bench._head.tensor_parallel import PARALLEL

START = 25.0
"""Guess: seconds until two processes have torch, one has the GPU, its ceilings and its kernels."""

_CASE = 0.4
"""Guess: seconds of batches, samples and a clean memory that a case takes besides its steps."""
_LAUNCHES = 100e-6
"""Guess: seconds in which the host starts what a pass does with a tile."""
_STEP = 1.5e-3
"""Guess: seconds of the host in a step besides tiles."""
_BUILT = 2e7
"""Guess: centers drawn a second."""
_RANDOM = 2e8
"""Guess: random numbers a second of a CPU core: the textbook head draws one for each center."""
_COMPILED = {"compiled": 30.0, "cut_cross_entropy": 10.0, "cut_cross_entropy_filtered": 10.0}
"""Guess: seconds that the compiler or a search for the best blocks takes."""
_CONTEXT = 2**31
"""Guess: bytes of a card that are nobody's: CUDA's own, and what lies between tensors."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def expected_seconds(case: Case) -> float:
    """Return the seconds of a case, what does not fit included."""
    products = 6 * case.batch * _rows(case) * case.dim / (_rate(case.dtype))
    seconds = _CASE
    for name in case.heads:  # one after the other
        steps = (WARM_UP + case.steps) * (step_seconds(name, case) + products)
        if case.longest is not None:
            steps = min(steps, (WARM_UP + 1) * step_seconds(name, case) + case.longest)
        seconds += case.classes / _BUILT + _COMPILED.get(name, 0.0) + max(steps, case.seconds)
    return seconds


def card_for(name: str, row: Mapping[str, Any]) -> str:
    """Return the bytes that this head of a row needs, and the smallest card that has them."""
    logits, whole = row["batch"] * _rows(row), row["classes"] * row["dim"]
    if name in TEXTBOOKS:
        needed = 16 * logits + 16 * whole
    elif name in ("compiled", *PARALLEL):
        needed = (12 * logits + 24 * whole) / row.get("world", 1)
    elif name in BASELINES:
        needed = 24 * whole + logits / 2  # a quarter of the logits at once
    else:
        needed = (_BYTES[row["centers"]] + _BYTES[row["momentum"]]) * whole + 2**30
    cards = sorted(GPUS.values(), key=lambda gpu: gpu.memory)
    fits = (gpu.name for gpu in cards if gpu.memory >= needed + _CONTEXT)
    return f"about {needed / 2**30:.0f} GiB: {next(fits, 'no card that is known')}"


def step_seconds(name: str, case: Case) -> float:
    """Return the seconds of a step: those of the GPU, or of the host where it takes longer."""
    rows, dim = _rows(case), case.dim
    bandwidth, logits = GPUS["h200"].bandwidth * MEMORY, case.batch * rows
    if name == "liger":  # reads and writes the gradient of all centers for every few rows
        chunks = case.batch / max(1, case.batch * dim / case.classes)
        return chunks * 2 * 2 * case.classes * dim / bandwidth
    if name in (*BASELINES, *PARALLEL):
        return 8 * logits * dim / (_rate(case.dtype) * 0.3) + 64 * case.classes * dim / bandwidth
    if name in TEXTBOOKS:
        rate = _rate("tf32" if name == "textbook_tf32" else "fp32")
        moved = 162 * logits + (124 * rows + 56 * case.classes) * dim
        drawn = case.classes / _RANDOM if case.rate < 1 else 0.0
        return 6 * logits * dim / rate + moved / bandwidth + drawn
    row_bytes = (4 * _BYTES[case.centers] + 2 * _BYTES[case.momentum]) * dim
    if case.unsampled == "move" and case.rate < 1:
        row_bytes += 2 * (_BYTES[case.centers] + _BYTES[case.momentum]) * dim
    seconds = 8 * logits * dim / (_rate(case.dtype) * HEAD_SHARE)
    seconds += rows * row_bytes / bandwidth
    if name == "fused":
        return max(seconds, _STEP)
    tile_bytes = TILE_BYTES["cuda"] if case.tile_mib is None else case.tile_mib << 20
    most, in_turn = positives_of(name)
    passes, tiles = most if in_turn else 1, 4 * rows * (case.batch + dim) / tile_bytes
    return passes * max(seconds, _STEP + 2 * tiles * _LAUNCHES)


def _rate(dtype: str) -> float:
    peak: float = getattr(GPUS["h200"], dtype)
    return peak * PRODUCTS


def _rows(case: Case | Mapping[str, Any]) -> float:
    one = case if isinstance(case, Mapping) else asdict(case)
    rows: float = max(one["rate"] * one["classes"], min(one["batch"], one["classes"]))
    return rows
