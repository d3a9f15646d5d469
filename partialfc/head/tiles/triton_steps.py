"""The steps of a tile as Triton kernels: one pass over memory each, no host synchronisation.

They give what :mod:`partialfc.head.tiles.torch_steps` gives. No kernel uses atomics and no block
size depends on the device, so the same inputs give the same bits.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, K =
positives of a row, n = sampled rows, T = rows of a tile, 1 = one a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.tiles.torch_steps import leave_out_
from partialfc.head.tiles.workspace import Workspace
from partialfc.margins.base import Bend

_LARGEST_DIM = 4096
"""Elements of a row that one program holds."""
_SMALLEST_NORM = tl.constexpr(1e-10)
"""A shorter vector has no direction: its unit vector and its gradient are zero."""

_COLUMNS, _ROWS_AT_ONCE, _ROWS = 128, 16, 128
"""Block of ``exponentials``: columns, rows in registers, rows of one program."""


def unit_rows(
    centers_CD: Tensor, rows_n: Tensor | None, start: int, stop: int, out_TD: Tensor
) -> None:
    """Write the unit centers of rows ``start:stop`` of the sample to ``out_TD``, fp32 or bf16.

    A row with norm <= 1e-10 gives zeros; one that is not finite, or whose norm in fp32 is not,
    gives NaN.

    Args:
        centers_CD: fp32, bf16, fp16 or fp8, contiguous, D <= 4096. The scale of a row is of no
            matter here.
        rows_n: int64 rows of the sample; ``None`` for all rows in order.
        start: First place of the tile in the sample.
        stop: Place behind the last.
        out_TD: Contiguous.
    """
    dim = centers_CD.shape[1]
    assert centers_CD.is_contiguous()
    assert out_TD.is_contiguous()
    if stop > start:
        block = row_block(dim)
        _unit_rows[(stop - start,)](
            centers_CD, rows_n, out_TD, start, dim, block, num_warps=row_warps(block)
        )


def exponentials(
    logit_TB: Tensor,
    column_KB: Tensor,
    *,
    bend: Bend | None,
    shift_B: Tensor | None,
    sum_B: Tensor | None,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    factor_T1: Tensor | None = None,
) -> Tensor:
    """Return exp(logit - shift) times the bend's slope [T, B], and 0 at the positives.

    Args:
        logit_TB: Scaled products, fp32 or bf16, contiguous. Where it is fp32 and so is ``dtype``,
            the result overwrites it.
        column_KB: int64 rows of the tile that are the positives of each column, or any values
            outside. The kernel knows one a column; several are left out of ``logit_TB`` before it.
        bend: Another logit above a threshold; its slope is 1 below. ``None``: no other.
        shift_B: fp32, subtracted from the logits; ``None`` for 0.
        sum_B: fp32; the sums over the tile's negatives are added to it. ``None``: not wanted.
        dtype: Of the result, fp32 or bf16. The sum is that of the fp32 values.
        workspace: Not used.
        factor_T1: None: the keys are unit rows.
    """
    rows, columns = logit_TB.shape
    assert factor_T1 is None
    assert logit_TB.is_contiguous()
    exp_TB = logit_TB
    if not logit_TB.dtype == dtype == torch.float32:
        exp_TB = torch.empty_like(logit_TB, dtype=dtype)
    if not logit_TB.numel():
        return exp_TB
    column_B = column_KB[0]
    if len(column_KB) > 1:
        leave_out_(logit_TB, column_KB)
        column_B = torch.full_like(column_B, -1)
    blocks = triton.cdiv(rows, _ROWS)
    partial = None
    if sum_B is not None:
        partial = torch.empty(blocks, columns, dtype=torch.float32, device=logit_TB.device)
    _exponentials[(blocks * triton.cdiv(columns, _COLUMNS),)](
        logit_TB,
        column_B,
        shift_B,
        exp_TB,
        partial,
        None if bend is None else bend.threshold_B,
        None if bend is None else bend.coefficient_3,
        rows,
        columns,
        _ROWS,
        _ROWS_AT_ONCE,
        _COLUMNS,
        num_warps=4,
    )
    if sum_B is not None and partial is not None:
        sum_B.add_(partial.sum(0))
    return exp_TB


def row_block(dim: int) -> int:
    """Return the width of a block that holds one row of ``dim`` elements."""
    assert 1 <= dim <= _LARGEST_DIM, f"the kernels hold rows of 1 to {_LARGEST_DIM}, not {dim}"
    return max(4, 1 << (dim - 1).bit_length())


def row_warps(block: int) -> int:
    """Return the warps for one row: 8 elements a thread."""
    return max(1, block // 256)


@triton.jit
def reciprocal_norm(square):
    """1 / norm of a row, given the norm's square: 0 without a direction, NaN if not finite."""
    norm = tl.sqrt_rn(square)
    reciprocal = tl.where(norm > _SMALLEST_NORM, tl.div_rn(1.0, norm), 0.0)
    return tl.where(square < float("inf"), reciprocal, float("nan"))


@triton.jit(do_not_specialize=["start"])
def _unit_rows(centers, rows, unit, start: tl.int64, D, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    row = t + start
    if rows is not None:
        row = tl.load(rows + row)
    column = tl.arange(0, BLOCK)
    mask = column < D
    value = tl.load((centers + row * D) + column, mask=mask, other=0.0).to(tl.float32)
    factor = reciprocal_norm(tl.sum(value * value, 0))
    tl.store((unit + t * D) + column, (value * factor).to(unit.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _exponentials(
    logit,
    column,
    shift,
    exp,
    partial,
    threshold,
    coefficient,
    T,
    B,
    ROWS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(B, COLUMNS)
    block = (tl.program_id(0) // across).to(tl.int64)
    b = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = b < B
    positive = tl.load(column + b, mask=is_column, other=-1)
    if shift is not None:
        offset = tl.load(shift + b, mask=is_column, other=0.0)
    if threshold is not None:
        limit = tl.load(threshold + b, mask=is_column, other=0.0)
        constant = tl.load(coefficient)
        linear = tl.load(coefficient + 1)
        quadratic = tl.load(coefficient + 2)
    total = tl.zeros([ROWS_AT_ONCE, COLUMNS], tl.float32)
    first = block * ROWS
    logit += first * B
    exp += first * B
    height = tl.minimum(T - first, ROWS).to(tl.int32)
    positive = tl.where(positive // ROWS == block, positive % ROWS, -1).to(tl.int32)
    for step in range(0, ROWS, ROWS_AT_ONCE):
        t = step + tl.arange(0, ROWS_AT_ONCE)
        mask = (t < height)[:, None] & is_column[None, :]
        place = t[:, None] * B + b[None, :]
        value = tl.load(logit + place, mask=mask, other=0.0).to(tl.float32)
        counts = mask & (t[:, None] != positive[None, :])
        slope = 1.0
        if threshold is not None:
            above = value > limit[None, :]
            slope = tl.where(above, linear + 2 * quadratic * value, 1.0)
            value = tl.where(above, constant + value * (linear + quadratic * value), value)
        if shift is not None:
            value -= offset[None, :]
        value = tl.where(counts, tl.exp(value), 0.0)
        total += value
        tl.store(exp + place, (value * slope).to(exp.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store((partial + block * B) + b, tl.sum(total, 0), mask=is_column)
