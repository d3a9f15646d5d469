"""The update of the class centers as one Triton kernel: every byte is read and written once.

It gives what :mod:`partialfc.head.rows.rules` and :mod:`partialfc.head.rows.formats` give for SGD;
a second one does what rows have missed, as :mod:`partialfc.head.rows.catch_up` does. Products and
sums are not fused (no FMA), so the elementwise part is bit for bit that of torch operations one by
one; only the two sums over a row are taken in another order.

Shape suffixes: B = rows of all micro-batches, C = rows of the centers at hand, D = embedding, n =
rows meant, N = n + 1, P = positives, T = rows of a tile, t = steps so far, 22 = two rows and
columns of a matrix, 1 = one a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.rows.formats import FIRST_SCALE, FP8_FLOOR, MIX, SMALLEST_EXPONENT
from partialfc.head.rows.stored import (
    AT_STEP,
    CENTERS,
    MOMENTUM,
    RoundingKeys,
    SgdStep,
    Stored,
)
from partialfc.head.tiles.positives import Positives
from partialfc.head.tiles.triton_steps import reciprocal_norm, row_block, row_warps

_MIX_1, _MIX_2 = tl.constexpr(MIX[0]), tl.constexpr(MIX[1])
_EXPONENT_FLOOR = tl.constexpr(SMALLEST_EXPONENT)
_FP8_FLOOR = tl.constexpr(FP8_FLOOR)


def sgd_(
    stored: Stored,
    start: int,
    stop: int,
    gradient_TD: Tensor,
    own: Positives,
    first_N: Tensor,
    step: SgdStep,
) -> None:
    """Update rows ``start:stop`` of those meant in place, in the formats that they are stored in.

    With w the row, ŵ its unit row, and g the sum of ``gradient_TD`` and of the positives' part,
    ``g <- (g - ŵ (g·ŵ)) / |w|``, ``v <- momentum v + g + weight_decay w``, ``w <- w - lr v``, all
    in fp32. The v that moves w is the one before it is rounded. A row with norm <= 1e-10 has g = 0.

    Args:
        stored: Centers and momentum, contiguous, D <= 4096; changed in place.
        start: First place of the tile among the rows meant.
        stop: Place behind the last.
        gradient_TD: fp32 gradient by the unit centers, of the negatives; contiguous, not changed.
        own: The positives, each of which adds ``slope * embedding`` to the gradient.
        first_N: int64; row i has the positives ``first[i]`` to ``first[i + 1]`` of them.
        step: Rates, keys of the rounding, and whether anything is written.
    """
    centers_CD, momentum_CD = stored.centers, stored.states.get(MOMENTUM)
    dim = centers_CD.shape[1]
    for tensor in (centers_CD, momentum_CD, gradient_TD, own.embedding_BD):
        assert tensor is None or (tensor.is_contiguous() and tensor.shape[1] == dim)
    assert (stored.scale(CENTERS) is not None) == (centers_CD.dtype in FIRST_SCALE)
    assert (stored.scale(MOMENTUM) is not None) == (
        momentum_CD is not None and momentum_CD.dtype == torch.int8
    )
    if stop == start:
        return
    block = row_block(dim)
    _sgd[(stop - start,)](
        centers_CD,
        stored.scale(CENTERS),
        momentum_CD,
        stored.scale(MOMENTUM),
        stored.rows.row_n,
        gradient_TD,
        first_N,
        own.row_P,
        own.slope_P,
        own.embedding_BD,
        step.skip,
        float(step.lr),
        float(step.weight_decay),
        float(step.momentum),
        start,
        step.keys.centers,
        step.keys.momentum,
        stored.rows.first_row,
        dim,
        block,
        stored.rows.compact,
        num_warps=row_warps(block),
        num_stages=1,
        enable_fp_fusion=False,
    )


def catch_up_(stored: Stored, product_t22: Tensor, block: int, keys: RoundingKeys) -> None:
    """Bring rows and their momentum up to the newest step, in the formats they are stored in.

    A row that is at it is left alone.

    Args:
        stored: Centers, momentum and the int32 step that each row is at; changed in place.
        product_t22: fp64, contiguous, of :class:`partialfc.head.rows.catch_up.Moves`.
        block: The step that its newest block starts at.
        keys: Of the rounding.
    """
    centers_CD, momentum_CD = stored.centers, stored.states.get(MOMENTUM)
    at_step_C1, dim = stored.states[AT_STEP], centers_CD.shape[1]
    for tensor in (centers_CD, momentum_CD, at_step_C1, product_t22):
        assert tensor is None or tensor.is_contiguous()
    if not stored.count:
        return
    width = row_block(dim)
    _catch_up[(stored.count,)](
        centers_CD,
        stored.scale(CENTERS),
        momentum_CD,
        stored.scale(MOMENTUM),
        at_step_C1,
        stored.rows.row_n,
        product_t22,
        len(product_t22) - 1,
        block,
        keys.centers,
        keys.momentum,
        stored.rows.first_row,
        dim,
        width,
        stored.rows.compact,
        num_warps=row_warps(width),
        num_stages=1,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["start", "center_key", "momentum_key", "first_row"])
def _sgd(
    centers,
    center_scale,
    momentum,
    momentum_scale,
    rows,
    gradient,
    first,
    row_of,
    slope,
    embedding,
    skip,
    lr,
    weight_decay,
    decay,
    start: tl.int64,
    center_key: tl.int64,
    momentum_key: tl.int64,
    first_row: tl.int64,
    D,
    BLOCK: tl.constexpr,
    COMPACT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    place = t + start
    row, number = _row(rows, place, first_row, COMPACT)
    lane = tl.arange(0, BLOCK // 4)  # four columns share one hash, and one thread holds them
    column = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = column < D
    centers += row * D

    w = tl.load(centers + column, mask=mask, other=0.0).to(tl.float32)
    if center_scale is not None:
        w *= tl.load(center_scale + row)
    if momentum is not None:  # asked for early: what follows waits for whole rows
        momentum += row * D
        old = tl.load(momentum + column, mask=mask, other=0).to(tl.float32)
        if momentum_scale is not None:
            old *= tl.load(momentum_scale + row)
    g = tl.load((gradient + t * D) + column, mask=mask, other=0.0)
    k, behind = tl.load(first + place), tl.load(first + place + 1)
    while k < behind:
        b = tl.load(row_of + k)
        e = tl.load((embedding + b * D) + column, mask=mask, other=0.0).to(tl.float32)
        g += tl.load(slope + k) * e
        k += 1

    reciprocal = reciprocal_norm(_sum(w * w))
    unit = w * reciprocal
    g = (g - unit * _sum(g * unit)) * reciprocal
    v = g + weight_decay * w
    if momentum is not None:
        v = decay * old + v
    w = w - lr * v

    written = True
    if skip is not None:
        written = tl.load(skip) == 0
    lanes = tl.cdiv(D, 4)
    bits = noise(number * lanes + lane + center_key)
    largest = tl.max(tl.max(tl.abs(w), 1), 0)
    store(centers + column, center_scale, row, w, largest, bits, mask & written, written)
    if momentum is not None:
        bits = noise(number * lanes + lane + momentum_key)
        largest = tl.max(tl.max(tl.abs(v), 1), 0)
        store(momentum + column, momentum_scale, row, v, largest, bits, mask & written, written)


@triton.jit(do_not_specialize=["now", "newest", "center_key", "momentum_key", "first_row"])
def _catch_up(
    centers,
    center_scale,
    momentum,
    momentum_scale,
    at_step,
    rows,
    product,
    now,
    newest,
    center_key: tl.int64,
    momentum_key: tl.int64,
    first_row: tl.int64,
    D,
    BLOCK: tl.constexpr,
    COMPACT: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, number = _row(rows, place, first_row, COMPACT)
    at = tl.load(at_step + row)
    if at < now:
        column = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        mask = column < D
        bits = number * tl.cdiv(D, 4) + tl.arange(0, BLOCK // 4)
        centers += row * D
        w = tl.load(centers + column, mask=mask, other=0.0).to(tl.float32)
        if center_scale is not None:
            w *= tl.load(center_scale + row)
        row_by_row, row_by_v, v_by_row, v_by_v = _product(product, at, newest)
        moved = row_by_row * w
        if momentum is not None:
            momentum += row * D
            v = tl.load(momentum + column, mask=mask, other=0).to(tl.float32)
            if momentum_scale is not None:
                v *= tl.load(momentum_scale + row)
            moved = row_by_v * v + moved
            v = v_by_v * v + v_by_row * w
            largest = tl.max(tl.max(tl.abs(v), 1), 0)
            drawn = noise(bits + momentum_key)
            store(momentum + column, momentum_scale, row, v, largest, drawn, mask, True)
        largest = tl.max(tl.max(tl.abs(moved), 1), 0)
        drawn = noise(bits + center_key)
        store(centers + column, center_scale, row, moved, largest, drawn, mask, True)
        tl.store(at_step + row, now)


@triton.jit
def _row(rows, place, first_row, COMPACT: tl.constexpr):
    """Where a row of the sample lies, and the global number that it is rounded by."""
    row = place
    if rows is not None:
        row = tl.load(rows + place)
    number = row + first_row
    if COMPACT:
        row = place
    return row, number


@triton.jit
def _product(product, at, newest):
    """The four elements of ``Moves.since``, in fp32."""
    entry = product + at.to(tl.int64) * 4
    a, b, c, d = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if at < newest:
        later = product + newest.to(tl.int64) * 4
        e, f, g, h = tl.load(later), tl.load(later + 1), tl.load(later + 2), tl.load(later + 3)
        a, b, c, d = e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def _sum(value):
    return tl.sum(tl.sum(value, 1), 0)


@triton.jit
def noise(bits):
    """16 random bits of each of four columns, from their int64 lane and key."""
    bits = (bits ^ ((bits >> 33) & 0x7FFFFFFF)) * _MIX_1
    bits = (bits ^ ((bits >> 33) & 0x7FFFFFFF)) * _MIX_2
    bits = bits ^ ((bits >> 33) & 0x7FFFFFFF)
    return ((bits[:, None] >> (16 * tl.arange(0, 4))[None, :]) & 0xFFFF).to(tl.int32)


@triton.jit
def store(pointer, scale, row, value, largest, noise, mask, written):
    """Write rows in their format: ``partialfc.head.rows.formats.encode``; ``largest`` is of each
    row."""
    FORMAT: tl.constexpr = pointer.dtype.element_ty
    if tl.float32 == FORMAT:
        tl.store(pointer, value, mask=mask)
    elif tl.bfloat16 == FORMAT:
        tl.store(pointer, _truncate(value, noise, 0xFFFF).to(tl.bfloat16), mask=mask)
    else:
        if tl.float16 == FORMAT:
            exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, _EXPONENT_FLOOR)
            inverse = ((267 - exponent) << 23).to(tl.float32, bitcast=True)  # 2**(140 - exponent)
            tl.store(pointer, _truncate(value * inverse, noise, 0x1FFF).to(tl.float16), mask=mask)
            step = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
        elif tl.float8e4nv == FORMAT:
            exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, _EXPONENT_FLOOR)
            inverse = ((261 - exponent) << 23).to(tl.float32, bitcast=True)  # 2**(134 - exponent)
            tl.store(pointer, _eighths(value * inverse, noise).to(tl.float8e4nv), mask=mask)
            step = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
        else:
            inverse = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
            level = tl.floor(value * inverse + (noise.to(tl.float32) + 0.5) * 0.0000152587890625)
            level = tl.minimum(tl.maximum(level, -127.0), 127.0)
            tl.store(pointer, level.to(tl.int8), mask=mask)
            step = tl.div_rn(largest, 127.0)
        tl.store(scale + row, step, mask=written)


@triton.jit
def _eighths(value, noise):
    """Round to what fp8 can hold: eighths of the power of two below, or of its smallest one."""
    power = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, _FP8_FLOOR)
    inverse = tl.maximum((254 << 23) - power, 0)  # of an infinity 0, and their product is NaN
    eighth = value * inverse.to(tl.float32, bitcast=True) * 8.0
    eighth = tl.floor(eighth + (noise.to(tl.float32) + 0.5) * 0.0000152587890625)
    return eighth * (power.to(tl.float32, bitcast=True) * 0.125)


@triton.jit
def _truncate(value, noise, MASK: tl.constexpr):
    """Drop mantissa bits after adding random ones; a NaN must not carry into a zero."""
    word = value.to(tl.int32, bitcast=True) + (noise & MASK)
    return tl.where(value == value, (word & ~MASK).to(tl.float32, bitcast=True), value)
