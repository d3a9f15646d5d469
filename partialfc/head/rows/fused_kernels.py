"""Pass 2 as one Triton kernel: a block of classes, the queries streamed past it, its rows updated.

It gives what :func:`partialfc.head.tiles.passes.second_pass` and
:func:`partialfc.head.rows.kernels.sgd_` give; :mod:`partialfc.head.tiles.fused_kernels` has pass 1.
The gradient of a block is in registers while it grows. It is written once, because the rows with
their states do not fit beside it, and read from the cache, some rows at a time, by who wrote it.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, n =
rows of pass 2, N = n + 1, P = positives, T = rows of a tile.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.machine import card_of
from partialfc.head.rows.kernels import noise, store
from partialfc.head.rows.stored import CENTERS, MOMENTUM, SgdStep, Stored
from partialfc.head.tiles.cards import Kernel
from partialfc.head.tiles.fused_kernels import bent, width
from partialfc.head.tiles.limits import STATIONARY
from partialfc.head.tiles.parts import MicroBatch
from partialfc.head.tiles.positives import Positives
from partialfc.head.tiles.triton_steps import reciprocal_norm

_UPDATED = 8
"""Rows that a program of pass 2 updates at once, from the gradient that it has just written."""


@dataclass(frozen=True, slots=True)
class TileGradient:
    """What the gradient of a tile is made from, and where it goes.

    Attributes:
        start: First place of the tile among the rows meant.
        stop: Place behind the last.
        key_TD: Unit centers in the dtype of the queries; ``None`` with ``exp_TB``.
        exp_TB: The exponentials that pass 1 kept of these rows; ``None``: computed here.
        gradient_TD: Gets the fp32 gradient of this micro-batch.
        earlier_TD: That of all earlier ones, if there were any; added where ``last``.
        last: Whether the rows are to be updated now.
    """

    start: int
    stop: int
    key_TD: Tensor | None
    exp_TB: Tensor | None
    gradient_TD: Tensor
    earlier_TD: Tensor | None
    last: bool


def update_(
    stored: Stored,
    part: MicroBatch,
    tile: TileGradient,
    own: Positives,
    first_N: Tensor,
    step: SgdStep,
) -> None:
    """Update the rows of a tile by one micro-batch, or add to their gradient.

    Args:
        stored: Centers and momentum, as in :func:`partialfc.head.rows.kernels.sgd_`.
        part: The micro-batch; its queries are contiguous, D <= 512.
        tile: Of the rows meant.
        own: The positives of all micro-batches.
        first_N: As in :func:`partialfc.head.rows.kernels.sgd_`.
        step: Rates, keys of the rounding, and whether anything is written.
    """
    kept, bend = part.kept, part.kept.logits.bend
    centers_CD, momentum_CD = stored.centers, stored.states.get(MOMENTUM)
    gradient_TD, exp_TB = tile.gradient_TD, tile.exp_TB
    batch, dim = kept.query_BD.shape
    for tensor in (
        centers_CD,
        momentum_CD,
        kept.query_BD,
        own.embedding_BD,
        gradient_TD,
        exp_TB,
    ):
        assert tensor is None or tensor.is_contiguous()
    if tile.stop == tile.start:
        return
    kernel: Kernel = "update" if exp_TB is None else "update_kept"
    shape = card_of(centers_CD.device).shape(kernel, dim)
    _update[(triton.cdiv(tile.stop - tile.start, STATIONARY),)](
        centers_CD,
        stored.scale(CENTERS),
        momentum_CD,
        stored.scale(MOMENTUM),
        stored.rows.row_n,
        kept.query_BD,
        tile.key_TD,
        part.target_P,
        kept.negative_B,
        kept.maximum_B,
        None if bend is None else bend.threshold_B,
        None if bend is None else bend.coefficient_3,
        kept.even_D,
        part.present_n,
        exp_TB,
        gradient_TD,
        tile.earlier_TD,
        first_N,
        own.row_P,
        own.target_P,
        own.slope_P,
        own.embedding_BD,
        step.skip,
        float(kept.logits.scale),
        float(step.lr),
        float(step.weight_decay),
        float(step.momentum),
        tile.start,
        tile.stop,
        step.keys.centers,
        step.keys.momentum,
        stored.rows.first_row,
        batch,
        dim,
        STATIONARY,
        shape.streamed,
        width(dim),
        _UPDATED,
        stored.rows.compact,
        tile.last,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["start", "stop", "center_key", "momentum_key", "first_row", "B"])
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
    row_of,
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
    first_row: tl.int64,
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
                row_of,
                place_of,
                slope_of,
                embedding,
                skip,
                lr,
                weight_decay,
                decay,
                center_key,
                momentum_key,
                first_row,
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
    row_of,
    place_of,
    slope_of,
    embedding,
    skip,
    lr,
    weight_decay,
    decay,
    center_key,
    momentum_key,
    first_row,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """The arithmetic of ``kernels._sgd`` on several rows, whose gradient is in the cache."""
    t = tl.arange(0, ROWS)
    is_row = t < height
    row = begin + t
    if rows is not None:
        row = tl.load(rows + row, mask=is_row, other=0)
    number = row + first_row
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
        b = tl.load(row_of + k)
        is_own = t == tl.load(place_of + k) - begin
        share = tl.load(embedding + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        g += tl.where(is_own[:, None], (tl.load(slope_of + k) * share)[None, :], 0.0)
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
    lane = number[:, None] * tl.cdiv(D, 4) + tl.arange(0, WIDTH // 4)[None, :]
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
