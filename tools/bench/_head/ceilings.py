"""What a machine can do, measured on all ranks at once: matrix products and copies.

The clock and the sums over ranks are also those of tools/bench/_head/measure.py.

Shape suffixes: B = rows of a batch, D = embedding, T = rows of a tile.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def over_ranks(value: float, operation: str, device: torch.device) -> float:
    """Return the MAX or SUM over ranks. Collective: one all-reduce."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, getattr(dist.ReduceOp, operation))
    return float(shared.item())


def timed(device: torch.device, run: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    """Return the seconds and the result of a call, begun on all ranks together.

    On a GPU the clock runs to the end of all streams, so what the head does beside is included.
    """
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def multiply_backward(device: torch.device) -> None:
    """Have cuBLAS take what the thread of backward wants once, lest it be some head's memory."""
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    torch.autograd.backward((weight @ weight).sum())


def ceilings_of(dim: int, batch: int, device: torch.device) -> dict[str, float]:
    """Measure what the machine can do, all ranks at once, summed over ranks; collective.

    Returns:
        FLOP/s of matrix products by dtype, the best of shapes like the head's (T x D by D x B) and
        of a square; bytes/s, read and written, of copying an array far larger than the caches.
    """
    gpu = device.type == "cuda"
    # In units of D, so that a trial at a few dimensions is over soon: 8192 at the usual 512.
    square, rows = (16 * dim, (32 * dim, 256 * dim)) if gpu else (2048, (1024, 8192))
    shapes = [*((row, dim, batch) for row in rows), (square, square, square)]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if gpu:
        dtypes["tf32"] = torch.float32
    found = {}
    for name, dtype in dtypes.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        best = max(_matmul_rate(shape, dtype, device) for shape in shapes)
        found[name] = over_ranks(best, "SUM", device)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.ones(2**19 * dim if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    best = _best_seconds(lambda: target.copy_(source), device)
    found["copy"] = over_ranks(2 * source.nbytes / best, "SUM", device)
    return found


def three_products(
    rows: int, dim: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Return what does the matrix products of a step of the head and nothing else.

    Logits, their product with the centers and the gradient of the centers, tile by tile as the head
    does them where it keeps the exponentials; all tiles in the same memory, so it is in the caches.
    """
    tile = min(rows, 2048 if device.type == "cpu" else 65536)
    key_TD, exp_TB, query_BD = (
        torch.rand(size, device=device, dtype=dtype)
        for size in ((tile, dim), (tile, batch), (batch, dim))
    )
    logit_TB, pull_BD, gradient_TD = (torch.empty_like(t) for t in (exp_TB, query_BD, key_TD))

    def run() -> None:
        for start in range(0, rows, tile):
            n = min(tile, rows - start)
            torch.mm(key_TD[:n], query_BD.T, out=logit_TB[:n])
            torch.mm(exp_TB[:n].T, key_TD[:n], out=pull_BD)
        for start in range(0, rows, tile):
            n = min(tile, rows - start)
            torch.mm(exp_TB[:n], query_BD, out=gradient_TD[:n])

    return run


def _matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype).T
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = _best_seconds(lambda: torch.mm(left, right, out=out), device)
    return 2 * rows * inner * columns / seconds


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a call among many, ten to a measurement on a GPU; at least 0.1 s of them."""
    inner = 10 if device.type == "cuda" else 1
    timed(device, run)
    best, total = math.inf, 0.0
    while over_ranks(total, "MAX", device) < 0.1:
        seconds, _ = timed(device, lambda: [run() for _ in range(inner)])
        best, total = min(best, seconds / inner), total + seconds
    return best
