"""Pass 2 as one Triton kernel: a block of classes, the queries streamed past it, its rows updated.

It gives what :func:`partialfc.head.tiles.passes.second_pass` and
:func:`partialfc.head.rows.kernels.sgd_` give; :mod:`partialfc.head.tiles.fused_kernels` has pass 1.
The gradient of a block is in registers while it grows. It is written once, because the rows with
their states do not fit beside it, and read from the cache, some rows at a time, by who wrote it.

Shape suffixes: B = rows of the gathered batch, C = rows of a shard, D = embedding, n = sampled
rows, P = positives, T = rows of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.rows.kernels import noise, store
from partialfc.head.tiles.fused_kernels import STAGES, WARPS, bent, streamed, width
from partialfc.head.tiles.limits import STATIONARY
from partialfc.head.tiles.triton_steps import reciprocal_norm
from partialfc.margins.base import Bend

_UPDATED = 8
"""Rows that a program of pass 2 updates at once, from the gradient that it has just written."""


def update_(
    centers_CD: Tensor,
    center_scale_C1: Tensor | None,
    momentum_CD: Tensor | None,
    momentum_scale_C1: Tensor | None,
    rows_n: Tensor | None,
    start: int,
    stop: int,
    *,
    query_BD: Tensor,
    key_TD: Tensor | None,
    target_B: Tensor,
    factor_B: Tensor,
    scale: float,
    maximum_B: Tensor | None,
    bend: Bend | None,
    even_D: Tensor | None,
    present_n: Tensor | None,
    exp_TB: Tensor | None,
    gradient_TD: Tensor,
    earlier_TD: Tensor | None,
    last: bool,
    first_n1: Tensor,
    order_P: Tensor,
    place_P: Tensor,
    slope_P: Tensor,
    embedding_PD: Tensor,
    lr: float,
    weight_decay: float,
    momentum: float,
    center_key: int,
    momentum_key: int,
    first_identity: int,
    skip: Tensor | None,
    compact: bool,
) -> None:
    """Update rows ``start:stop`` of the sample by one micro-batch, or add to their gradient.

    Arguments that are not here are those of :func:`partialfc.head.rows.kernels.sgd_`.

    Args:
        query_BD: fp32 or bf16, contiguous, D <= 512.
        key_TD: Unit centers of the rows in the dtype of the queries; ``None`` with ``exp_TB``.
        target_B: int64 place of each query's positive in the sample, or any outside.
        factor_B: fp32 factor that makes an exponential the derivative of the loss by the product.
        scale: Factor of the products.
        maximum_B: Subtracted from the logits; ``None`` for 0.
        bend: As in pass 1.
        even_D: fp32, subtracted from the gradient of every row that is present.
        present_n: bool [n]; rows that the micro-batch sampled; ``None`` for all.
        exp_TB: The exponentials that pass 1 kept of these rows; ``None``: computed here.
        gradient_TD: Gets the fp32 gradient of this micro-batch.
        earlier_TD: That of all earlier ones, if there were any; added where ``last``.
        last: Whether the rows are to be updated now.
        place_P: int64 places of the positives in the sample, ascending: those of ``order_P``.
    """
    batch, dim = query_BD.shape
    for tensor in (centers_CD, momentum_CD, query_BD, embedding_PD, gradient_TD, exp_TB):
        assert tensor is None or tensor.is_contiguous()
    if stop == start:
        return
    _update[(triton.cdiv(stop - start, STATIONARY),)](
        centers_CD,
        center_scale_C1,
        momentum_CD,
        momentum_scale_C1,
        rows_n,
        query_BD,
        key_TD,
        target_B,
        factor_B,
        maximum_B,
        None if bend is None else bend.threshold_B,
        None if bend is None else bend.coefficient_3,
        even_D,
        present_n,
        exp_TB,
        gradient_TD,
        earlier_TD,
        first_n1,
        order_P,
        place_P,
        slope_P,
        embedding_PD,
        skip,
        float(scale),
        float(lr),
        float(weight_decay),
        float(momentum),
        start,
        stop,
        center_key,
        momentum_key,
        first_identity,
        batch,
        dim,
        STATIONARY,
        streamed(dim),
        width(dim),
        _UPDATED,
        compact,
        last,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=False,
    )


@triton.jit(
    do_not_specialize=["start", "stop", "center_key", "momentum_key", "first_identity", "B"]
)
def _update(
    centers,
    center_scale,
    momentum,
    momentum_scale,
    rows,
    query,
    key,
    target,
    factor,
    maximum,
    threshold,
    coefficient,
    even,
    present,
    exp,
    gradient,
    earlier,
    first,
    order,
    place_of,
    slope_of,
    embedding,
    skip,
    scale,
    lr,
    weight_decay,
    decay,
    start: tl.int64,
    stop: tl.int64,
    center_key: tl.int64,
    momentum_key: tl.int64,
    first_identity: tl.int64,
    B,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COMPACT: tl.constexpr,
    LAST: tl.constexpr,
):
    begin = start + tl.program_id(0).to(tl.int64) * CLASSES
    t = tl.arange(0, CLASSES)
    height = tl.minimum(stop - begin, CLASSES).to(tl.int32)
    is_class = t < height
    d = tl.arange(0, WIDTH)
    inside = t[:, None] * D + d[None, :]
    mask = is_class[:, None] & (d < D)[None, :]
    gradient += (begin - start) * D
    is_here = is_class
    if present is not None:
        is_here = is_class & (tl.load(present + begin + t, mask=is_class, other=0) != 0)
    acc = tl.zeros([CLASSES, WIDTH], tl.float32)
    if exp is None:
        k = tl.load(key + (begin - start) * D + inside, mask=mask, other=0.0)
    else:
        exp += (begin - start) * B
    for first_query in range(0, B, QUERIES):
        b = first_query + tl.arange(0, QUERIES)
        is_query = b < B
        q = tl.load(
            query + (b[:, None] * D + d[None, :]),
            mask=is_query[:, None] & (d < D)[None, :],
            other=0.0,
        )
        times = tl.load(factor + b, mask=is_query, other=0.0)
        e = tl.zeros([CLASSES, QUERIES], query.dtype.element_ty)
        if first_query < B:  # always, see _pull
            if exp is None:
                z = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
                slope = 1.0
                if threshold is not None:
                    limit = tl.load(threshold + b, mask=is_query, other=0.0)
                    z, slope = bent(z, limit[None, :], coefficient)
                if maximum is not None:
                    z -= tl.load(maximum + b, mask=is_query, other=0.0)[None, :]
                positive = tl.load(target + b, mask=is_query, other=-1) - begin
                positive = tl.where((positive >= 0) & (positive < CLASSES), positive, -1)
                counts = is_here[:, None] & (t[:, None] != positive.to(tl.int32)[None, :])
                value = tl.where(counts, tl.exp(z), 0.0) * slope
            else:
                value = tl.load(
                    exp + (t[:, None] * B + b[None, :]),
                    mask=is_class[:, None] & is_query[None, :],
                    other=0.0,
                ).to(tl.float32)
            e = (value * times[None, :]).to(query.dtype.element_ty)
        acc = tl.dot(e, q, acc, input_precision="ieee")
    if even is not None:
        share = tl.load(even + d, mask=d < D, other=0.0)
        acc -= tl.where(is_here[:, None], share[None, :], 0.0)
    tl.store(gradient + inside, acc, mask=mask)
    if LAST:
        tl.debug_barrier()
        if earlier is not None:
            earlier += (begin - start) * D
        for top in range(0, height, ROWS):
            _rows(
                begin + top,
                tl.minimum(height - top, ROWS),
                gradient + top * D,
                None if earlier is None else earlier + top * D,
                centers,
                center_scale,
                momentum,
                momentum_scale,
                rows,
                first,
                order,
                place_of,
                slope_of,
                embedding,
                skip,
                lr,
                weight_decay,
                decay,
                center_key,
                momentum_key,
                first_identity,
                D,
                ROWS,
                WIDTH,
                COMPACT,
            )


@triton.jit
def _rows(
    begin,
    height,
    gradient,
    earlier,
    centers,
    center_scale,
    momentum,
    momentum_scale,
    rows,
    first,
    order,
    place_of,
    slope_of,
    embedding,
    skip,
    lr,
    weight_decay,
    decay,
    center_key,
    momentum_key,
    first_identity,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """The arithmetic of ``row_kernels._sgd`` on several rows, whose gradient is in the cache."""
    t = tl.arange(0, ROWS)
    is_row = t < height
    row = begin + t
    if rows is not None:
        row = tl.load(rows + row, mask=is_row, other=0)
    identity = row + first_identity
    if COMPACT:
        row = begin + t
    d = tl.arange(0, WIDTH)
    mask = is_row[:, None] & (d < D)[None, :]
    place = row[:, None] * D + d[None, :]
    w = tl.load(centers + place, mask=mask, other=0.0).to(tl.float32)
    if center_scale is not None:
        w *= tl.load(center_scale + row, mask=is_row, other=0.0)[:, None]
    if momentum is not None:
        old = tl.load(momentum + place, mask=mask, other=0).to(tl.float32)
        if momentum_scale is not None:
            old *= tl.load(momentum_scale + row, mask=is_row, other=0.0)[:, None]
    g = tl.load(gradient + (t[:, None] * D + d[None, :]), mask=mask, other=0.0)
    if earlier is not None:
        g += tl.load(earlier + (t[:, None] * D + d[None, :]), mask=mask, other=0.0)
    k, behind = tl.load(first + begin), tl.load(first + begin + height)
    while k < behind:
        p = tl.load(order + k)
        is_own = t == tl.load(place_of + k) - begin
        share = tl.load(embedding + p * D + d, mask=d < D, other=0.0).to(tl.float32)
        g += tl.where(is_own[:, None], (tl.load(slope_of + p) * share)[None, :], 0.0)
        k += 1

    reciprocal = reciprocal_norm(tl.sum(w * w, 1))[:, None]
    unit = w * reciprocal
    g = (g - unit * tl.sum(g * unit, 1)[:, None]) * reciprocal
    v = g + weight_decay * w
    if momentum is not None:
        v = decay * old + v
    w = w - lr * v

    written = is_row[:, None]
    if skip is not None:
        written = written & (tl.load(skip) == 0)
    lane = identity[:, None] * tl.cdiv(D, 4) + tl.arange(0, WIDTH // 4)[None, :]
    row, mask = row[:, None], mask & written
    bits = _noise(lane + center_key, ROWS, WIDTH)
    largest = tl.max(tl.abs(w), 1)[:, None]
    store(centers + place, center_scale, row, w, largest, bits, mask, written)
    if momentum is not None:
        bits = _noise(lane + momentum_key, ROWS, WIDTH)
        largest = tl.max(tl.abs(v), 1)[:, None]
        store(momentum + place, momentum_scale, row, v, largest, bits, mask, written)


@triton.jit
def _noise(lane, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """16 random bits for each column of some rows, from int64 lanes of four columns."""
    return tl.reshape(noise(tl.reshape(lane, [ROWS * WIDTH // 4])), [ROWS, WIDTH])
