"""What a case of tools/bench/head.py should take on an H200, for tools/bench/gpu.sh.

Rates are those of partialfc estimate; the textbook head's bytes are counted.
"""

from partialfc.commands._estimate.step_time import GPUS, HEAD_SHARE, MEMORY, PRODUCTS
from partialfc.head.tiles.passes import TILE_BYTES
from tools.bench._head.measure import TEXTBOOKS, WARM_UP, Case, positives_of

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
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def expected_seconds(case: Case) -> float:
    """Return the seconds of a case, what does not fit included."""
    steps = sum(step_seconds(name, case) for name in case.heads)
    products = 6 * case.batch * _rows(case) * case.dim / (_rate(case.dtype))
    built = len(case.heads) * case.classes / _BUILT
    return built + _CASE + max((WARM_UP + case.steps) * (steps + products), case.seconds)


def step_seconds(name: str, case: Case) -> float:
    """Return the seconds of a step: those of the GPU, or of the host where it takes longer."""
    rows, dim = _rows(case), case.dim
    bandwidth, logits = GPUS["h200"].bandwidth * MEMORY, case.batch * rows
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


def _rows(case: Case) -> float:
    return max(case.rate * case.classes, min(case.batch, case.classes))
