"""Pass 1 as one Triton kernel: of logits and exponentials nothing is written but what is kept.

It has the shape of attention whose keys are its values: a program keeps a block of queries and the
sum of what pulls them, and streams the classes. It gives what
:func:`partialfc.head.tiles.passes.first_pass` gives; :mod:`partialfc.head.rows.fused_kernels` has
pass 2. Neither uses atomics and a block depends on the card alone, so the same inputs give the
same bits on it.

Shape suffixes: B = rows of the gathered batch, D = embedding, S = splits of a tile, T = rows of a
tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.machine import card_of
from partialfc.head.tiles.limits import LARGEST_DIM, STATIONARY
from partialfc.margins.base import Bend


def pull_(
    query_BD: Tensor,
    key_TD: Tensor,
    column_B: Tensor,
    *,
    scale: float,
    bend: Bend | None,
    sum_SB: Tensor,
    maximum_SB: Tensor | None,
    pull_SBD: Tensor | None,
    exp_TB: Tensor | None,
) -> None:
    """Write the sums of pass 1 over the negatives of a tile; each split has its own.

    Args:
        query_BD: fp32 or bf16, contiguous, D <= 512.
        key_TD: Unit centers in the dtype of the queries, contiguous.
        column_B: int64 row of the tile that is the positive of each query, or any value outside.
        scale: Factor of the products.
        bend: Another logit above a threshold; ``None``: no other.
        sum_SB: Gets the fp32 sums of exp(logit - maximum).
        maximum_SB: Gets the largest logits, -1e30 where there are none. ``None``: 0 is subtracted.
        pull_SBD: Gets the fp32 sums of exp(logit - maximum) * the bend's slope * key; ``None``: not
            wanted.
        exp_TB: Gets the exponentials times the slope, in the dtype of the queries; ``None``: not
            kept. Not together with ``maximum_SB``, which may grow after they are written.
    """
    batch, dim = query_BD.shape
    splits = len(sum_SB)
    for tensor in (query_BD, key_TD, sum_SB, maximum_SB, pull_SBD, exp_TB):
        assert tensor is None or tensor.is_contiguous()
    assert exp_TB is None or maximum_SB is None
    if not len(key_TD) or not batch:
        return
    shape = card_of(query_BD.device).shape("pull" if bend is None else "pull_bent", dim)
    _pull[(triton.cdiv(batch, STATIONARY) * splits,)](
        query_BD,
        key_TD,
        column_B,
        None if bend is None else bend.threshold_B,
        None if bend is None else bend.coefficient_3,
        sum_SB,
        maximum_SB,
        pull_SBD,
        exp_TB,
        float(scale),
        len(key_TD),
        batch,
        splits,
        dim,
        STATIONARY,
        shape.streamed,
        width(dim),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def width(dim: int) -> int:
    """Columns of a block that holds rows of ``dim`` elements."""
    assert 1 <= dim <= LARGEST_DIM, f"the fused kernels hold rows of 1 to {LARGEST_DIM}, not {dim}"
    return max(16, 1 << (dim - 1).bit_length())


@triton.jit(do_not_specialize=["T"])
def _pull(
    query,
    key,
    column,
    threshold,
    coefficient,
    sums,
    maximum,
    pull,
    exp,
    scale,
    T,
    B,
    SPLITS,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    across = tl.cdiv(B, ROWS)
    split = (tl.program_id(0) // across).to(tl.int64)  # neighbours read the same classes
    b = (tl.program_id(0) % across) * ROWS + tl.arange(0, ROWS)
    is_row = b < B
    d = tl.arange(0, WIDTH)
    inside = is_row[:, None] & (d < D)[None, :]
    q = tl.load(query + b[:, None] * D + d[None, :], mask=inside, other=0.0)
    positive = tl.load(column + b, mask=is_row, other=-1)
    positive = tl.where((positive >= 0) & (positive < T), positive, -1).to(tl.int32)
    if threshold is not None:
        limit = tl.load(threshold + b, mask=is_row, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    if maximum is not None:
        largest = tl.full([ROWS], -1e30, tl.float32)
    if pull is not None:
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
    length = tl.cdiv(tl.cdiv(T, SPLITS), CLASSES) * CLASSES
    first = split.to(tl.int32) * length
    for start in range(first, tl.minimum(first + length, T), CLASSES):
        t = start + tl.arange(0, CLASSES)
        k = tl.load(
            key + t[:, None] * D + d[None, :],
            mask=(t < T)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        e = tl.zeros([ROWS, CLASSES], key.dtype.element_ty)
        if start < T:  # always: without it the compiler gives every warp all of the logits
            z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            counts = (t < T)[None, :] & (t[None, :] != positive[:, None])
            slope = 1.0
            if threshold is not None:
                z, slope = bent(z, limit[:, None], coefficient)
            if maximum is not None:
                larger = tl.maximum(largest, tl.max(tl.where(counts, z, -1e30), 1))
                shrink = tl.exp(largest - larger)
                largest = larger
                total *= shrink
                if pull is not None:
                    acc *= shrink[:, None]
                z -= largest[:, None]
            e = tl.where(counts, tl.exp(z), 0.0)
            total += tl.sum(e, 1)
            e = (e * slope).to(key.dtype.element_ty)
        if exp is not None:
            tl.store(
                exp + (t[None, :] * B + b[:, None]),
                e,
                mask=(t < T)[None, :] & is_row[:, None],
            )
        if pull is not None:
            acc = tl.dot(e, k, acc, input_precision="ieee")
    tl.store(sums + split * B + b, total, mask=is_row)
    if maximum is not None:
        tl.store(maximum + split * B + b, largest, mask=is_row)
    if pull is not None:
        d = tl.arange(0, WIDTH)
        place = b[:, None] * D + d[None, :]
        tl.store(pull + split * B * D + place, acc, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def bent(z, limit, coefficient):
    """A logit behind its bend, and the bend's slope: 1 below ``limit``."""
    constant = tl.load(coefficient)
    linear = tl.load(coefficient + 1)
    quadratic = tl.load(coefficient + 2)
    above = z > limit
    slope = tl.where(above, linear + 2 * quadratic * z, 1.0)
    return tl.where(above, constant + z * (linear + quadratic * z), z), slope
