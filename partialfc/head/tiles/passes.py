"""The two passes of the head over tiles of class centers.

A logit is a product of a query (an embedding) and a key (a class center), each of unit length or
as it is. Logits exist one tile of classes at a time: pass 1 leaves the row sums of their
exponentials E and those exponentials times the keys; pass 2 leaves the gradient of its keys. E is
kept between the passes as far as a byte budget allows and computed again beyond it, so that pass 2
takes one matrix product or two. Neither the logits [n, B] nor the gradient of the keys [n, D] is
ever whole. In fp32, centers are multiplied as they are, and what is wanted of unit keys gets the
reciprocal norms, a factor for each key, on [T, B] instead of [T, D]; bf16 would round worse so.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, K =
positives of a row, n = sampled rows, P = K * B positives and other keys that are pulled, T = rows
of a tile, 1 = one a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.plan import Path
from partialfc.head.row_set import RowSet
from partialfc.head.tiles import torch_steps
from partialfc.head.tiles.dispatch import steps_of
from partialfc.head.tiles.parts import (
    FirstPass,
    Kept,
    KeptTile,
    Logits,
    MicroBatch,
    align,
    by_row,
)
from partialfc.head.tiles.positives import Positives
from partialfc.head.tiles.products import add_product_, scaled_products
from partialfc.head.tiles.workspace import Workspace
from partialfc.margins.base import Bend
from partialfc.numerics import precision, reciprocal_norms

_NO_LOGIT = -1e30
"""Row maximum of a tile without negatives: finite, so that no difference of two is NaN."""

TILE_BYTES = {"cpu": 5 << 20, "cuda": 1 << 27}
"""Size of a tile of centers and logits in fp32. On a CPU, with the gradient and the states of its
rows it stays in the last cache, and Python's part of a tile is small beside it. On a GPU, half of
the L2 cache of a Hopper, 32 MiB, would keep logits there, but at B = 4096 its products take 22 us
and the host 60 to 100 us to start them; four times that size hides the host. (By arithmetic:
``tools/bench/head.py --tile-mib`` measures it.)"""

_TILE_ROWS = 128
"""A tile is a multiple of it, as tensor cores like it."""


def first_pass(
    query_BD: Tensor,
    centers_CD: Tensor,
    rows: RowSet,
    target_P: Tensor,
    logits: Logits,
    *,
    want_pull: bool,
    want_key_sum: bool,
    keep_bytes: int,
    workspace: Workspace,
) -> FirstPass:
    """Sum the exponentials of the negatives' logits, tile by tile; no collective.

    Args:
        query_BD: Gathered queries in the operand dtype of ``logits.compute``.
        centers_CD: This rank's class centers, any float dtype and length.
        rows: Sampled ones of ``centers_CD``; the rows of an identity follow one another.
        target_P: Place of each positive, whose identity is left out of the sums, or ``NOT_LOCAL``.
        logits: What the products become.
        want_pull: Whether the gradient of the embeddings will be asked for.
        want_key_sum: Whether the sum of the keys is.
        keep_bytes: Most memory of the exponentials kept for pass 2.
        workspace: Buffers of the tiles.
    """
    dim = query_BD.shape[1]
    sum_B = torch.zeros_like(query_BD[:, 0], dtype=torch.float32)
    pull_BD = torch.zeros_like(query_BD, dtype=torch.float32) if want_pull else None
    key_sum_D = query_BD.new_zeros(dim, dtype=torch.float32) if want_key_sum else None
    maximum_B = torch.full_like(sum_B, _NO_LOGIT) if logits.needs_maximum else None
    sigmoid_B = None if logits.offset is None else torch.zeros_like(sum_B)
    exponentials: list[KeptTile] = []
    with precision(logits.compute, query_BD.device):
        for start, stop in tiles(query_BD, centers_CD, rows.place_n, logits.per_identity):
            dtype = query_BD.dtype
            key_TD, factor_T1 = _keys(centers_CD, rows, start, stop, dtype, logits, workspace)
            if key_sum_D is not None:
                unit_TD = key_TD if factor_T1 is None else key_TD * factor_T1
                key_sum_D.add_(unit_TD.sum(0, dtype=torch.float32))
            column_KB = by_row(target_P, len(sum_B)) - start
            keep_bytes -= len(key_TD) * query_BD.shape[0] * query_BD.element_size()
            products = key_TD, factor_T1, query_BD, start
            logit_TB = _logits(*products, column_KB, logits, workspace, lend=keep_bytes >= 0)
            logit_TB, slope_TB, bend = _bent_first(logit_TB, column_KB, logits, start, workspace)
            if maximum_B is not None:
                larger_B = torch.maximum(maximum_B, _largest(logit_TB, column_KB))
                shrink_B = (maximum_B - larger_B).exp()
                sum_B.mul_(shrink_B)
                if pull_BD is not None:
                    pull_BD.mul_(shrink_B.unsqueeze(1))
                maximum_B = larger_B
            sums = sum_B, sigmoid_B
            exp_TB = _exponentials(
                *(logit_TB, column_KB, logits, bend, maximum_B, sums),
                *(factor_T1, query_BD, workspace, start),
            )
            if slope_TB is not None:
                exp_TB.mul_(slope_TB)
            if pull_BD is not None:
                add_product_(pull_BD, exp_TB.T, key_TD)
            if keep_bytes >= 0:
                exponentials.append(KeptTile(exp_TB, maximum_B, factor_T1))
    count = rows.count(centers_CD)
    return FirstPass(sum_B, sigmoid_B, maximum_B, pull_BD, key_sum_D, count, exponentials)


def second_pass(
    centers_CD: Tensor, rows: RowSet, kept: Sequence[Kept], workspace: Workspace
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """Yield (start, stop, gradient [T, D] fp32, factor [T, 1]) of every tile; no collective.

    The gradient is that of the negatives by the keys, times the factor: their reciprocal norms, or
    ``None`` for 1. :func:`positives` has the rest. The tile's rows and the gradient may be changed
    by the caller before the next one is asked for.

    Args:
        centers_CD: This rank's class centers at hand, as in pass 1.
        rows: Those to compute, a superset of every micro-batch's.
        kept: The micro-batches; their gradients are added.
        workspace: Buffers of the tiles.
    """
    device, dim = centers_CD.device, centers_CD.shape[1]
    parts = [_Weighted.of(one, rows.row_n, like=kept[0].query_BD) for one in kept]
    per_identity = kept[0].logits.per_identity
    for number, (start, stop) in enumerate(
        tiles(kept[0].query_BD, centers_CD, rows.place_n, per_identity)
    ):
        gradient_TD = workspace("gradient", (stop - start, dim), torch.float32, device)
        key_TD: Tensor | None = None
        factor_T1: Tensor | None = None
        for part in parts:
            one, weighted_BD = part.one, part.weighted_BD
            query_BD, logits, maximum_B = one.kept.query_BD, one.logits, one.kept.maximum_B
            with precision(logits.compute, device):
                if number < len(part.exponentials):
                    tile = part.exponentials[number]
                    exp_TB, factor_T1 = tile.exp_TB, tile.factor_T1
                    if maximum_B is not None and tile.maximum_B is not None:
                        shrink_B = (tile.maximum_B - maximum_B).exp()
                        weighted_BD = weighted_BD * shrink_B.unsqueeze(1).to(weighted_BD.dtype)
                else:
                    if key_TD is None:
                        dtype = query_BD.dtype
                        key_TD, factor_T1 = _keys(
                            centers_CD, rows, start, stop, dtype, logits, workspace
                        )
                    column_KB = by_row(one.target_P, len(query_BD)) - start
                    products = key_TD, factor_T1, query_BD, start
                    logit_TB = _logits(*products, column_KB, logits, workspace)
                    logit_TB, slope_TB, bend = _bent_first(
                        logit_TB, column_KB, logits, start, workspace
                    )
                    exp_TB = _exponentials(
                        logit_TB,
                        column_KB,
                        logits,
                        bend,
                        maximum_B,
                        (None, None),
                        factor_T1,
                        query_BD,
                        workspace,
                        start,
                    )
                    if slope_TB is not None:
                        exp_TB.mul_(slope_TB)
                if one.present_n is not None:
                    exp_TB.mul_(one.present_n[start:stop].unsqueeze(1))
                add_product_(gradient_TD, exp_TB, weighted_BD, keep=part is not parts[0])
            even_D = one.kept.even_D
            if even_D is not None:
                even_TD = even_D if factor_T1 is None else even_D * factor_T1
                if one.present_n is not None:
                    even_TD = one.present_n[start:stop].unsqueeze(1) * even_TD
                gradient_TD.sub_(even_TD)
        yield start, stop, gradient_TD, factor_T1


def positives(row_n: Tensor | None, kept: Sequence[Kept]) -> Positives:
    """Return the positives' share of the same gradient, of rows ``row_n``: all if ``None``."""
    every = [
        (align(target_P, one.row_n, row_n), slope_P, direction_PD)
        for one in kept
        for target_P, slope_P, direction_PD in (
            (one.target_P, one.positive_P, one.positive_BD),
            *((pull.target_P, pull.slope_P, pull.direction_PD) for pull in one.pulls),
        )
    ]
    targets, slopes, directions = zip(*every, strict=True)
    return Positives.of(targets, slopes, directions)


def unit_keys(
    query_BD: Tensor,
    centers_CD: Tensor,
    rows: RowSet,
    logits: Logits,
    workspace: Workspace,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, unit keys [T, D]) of every tile; arguments as in :func:`first_pass`.

    The keys are in the dtype of the queries, valid until the next tile is asked for.
    """
    for start, stop in tiles(query_BD, centers_CD, rows.place_n, logits.per_identity):
        yield (
            start,
            _unit_keys(centers_CD, rows, start, stop, query_BD.dtype, logits.path, workspace),
        )


def tiles(
    query_BD: Tensor, centers_CD: Tensor, rows: Tensor | None, per_identity: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the tiles of a sample; a function of device, B, D, n and K."""
    total = len(centers_CD) if rows is None else len(rows)
    batch, dim = query_BD.shape
    size = TILE_BYTES[query_BD.device.type] // (4 * (batch + dim))
    step = _TILE_ROWS * per_identity
    size = max(step, size // step * step)
    for start in range(0, total, size):
        yield start, min(start + size, total)


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A micro-batch for products tile by tile.

    The factor ``negative_B`` of a whole column of E is moved to the queries, so that the gradient
    is E @ weighted queries. Exponentials of tiles of another size are not used.
    """

    one: MicroBatch
    weighted_BD: Tensor
    exponentials: list[KeptTile]

    @classmethod
    def of(cls, kept: Kept, row_n: Tensor | None, *, like: Tensor) -> "_Weighted":
        factor_B1 = kept.negative_B.unsqueeze(1)
        same_tiles = kept.row_n is row_n and kept.query_BD.shape == like.shape
        return cls(
            MicroBatch.of(kept, row_n),
            (kept.query_BD.float() * factor_B1).to(kept.query_BD.dtype),
            kept.exponentials if same_tiles else [],
        )


def _keys(
    centers_CD: Tensor,
    rows: RowSet,
    start: int,
    stop: int,
    dtype: torch.dtype,
    logits: Logits,
    workspace: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """The keys of a tile in the operand dtype, and the factor that is still to do, if any.

    They are a view where they are the centers themselves.
    """
    as_stored = centers_CD.dtype == dtype
    if logits.unit and (logits.path != "torch" or not as_stored or dtype == torch.bfloat16):
        return _unit_keys(centers_CD, rows, start, stop, dtype, logits.path, workspace), None
    if rows.newest is not None:
        key_TD = rows.newest(torch.arange(start, stop)).to(dtype)
    else:
        buffer_TD = None
        if rows.place_n is not None and as_stored:
            size = stop - start, centers_CD.shape[1]
            buffer_TD = workspace("key", size, dtype, centers_CD.device)
        key_TD = torch_steps.take_rows(centers_CD, rows.place_n, start, stop, out=buffer_TD)
        key_TD = key_TD.to(dtype)
    return key_TD, reciprocal_norms(key_TD) if logits.unit else None


def _unit_keys(
    centers_CD: Tensor,
    rows: RowSet,
    start: int,
    stop: int,
    dtype: torch.dtype,
    path: Path,
    workspace: Workspace,
) -> Tensor:
    key_TD = workspace("key", (stop - start, centers_CD.shape[1]), dtype, centers_CD.device)
    if rows.newest is None:
        steps_of(path).unit_rows(centers_CD, rows.place_n, start, stop, key_TD)
        return key_TD
    row_TD = rows.newest(torch.arange(start, stop))
    return torch.mul(row_TD, reciprocal_norms(row_TD), out=key_TD)


def _logits(
    key_TD: Tensor,
    factor_T1: Tensor | None,
    query_BD: Tensor,
    start: int,
    column_KB: Tensor,
    logits: Logits,
    workspace: Workspace,
    *,
    lend: bool = False,
) -> Tensor:
    """The logits of a tile at ``start``; -inf at what a row leaves out, and at all but the nearest
    of an identity's K centers.

    In fp32 they are in a buffer that E will take over: one to ``lend``, or that of every tile.
    """
    out_TB, size = None, (len(key_TD), len(query_BD))
    if lend and key_TD.dtype == torch.float32:
        out_TB = workspace.lend(size, key_TD.device)
    elif key_TD.dtype == torch.float32:
        out_TB = workspace("logit", size, torch.float32, key_TD.device)
    logit_TB = scaled_products(key_TD, query_BD, logits.scale, out_TB)
    if factor_T1 is not None:
        logit_TB.mul_(factor_T1)
    if logits.bend is None and logits.offset is None:
        logits.weigh_(logit_TB, start)
    if logits.per_identity > 1:
        torch_steps.keep_nearest_(logit_TB, column_KB, logits.per_identity)
    if logits.mask is not None:
        logits.mask.leave_out_(logit_TB, start)
    return logit_TB


def _exponentials(
    logit_TB: Tensor,
    column_KB: Tensor,
    logits: Logits,
    bend: Bend | None,
    maximum_B: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    factor_T1: Tensor | None,
    query_BD: Tensor,
    workspace: Workspace,
    start: int,
) -> Tensor:
    """E of a tile in the dtype of the queries, or what an offset has in its place."""
    sum_B, sigmoid_B = sums
    if logits.offset is not None:
        both = None if sum_B is None or sigmoid_B is None else (sum_B, sigmoid_B)
        return torch_steps.sigmoids(
            logit_TB,
            column_KB,
            logits.offset,
            sums=both,
            dtype=query_BD.dtype,
            factor_T1=factor_T1,
            log_weight_T1=logits.log_weights(start, len(logit_TB)),
        )
    exp_TB: Tensor = steps_of(logits.path).exponentials(
        logit_TB,
        column_KB,
        bend=bend,
        shift_B=maximum_B,
        sum_B=sum_B,
        dtype=query_BD.dtype,
        workspace=workspace,
        factor_T1=factor_T1,
    )
    return exp_TB


def _bent_first(
    logit_TB: Tensor, column_KB: Tensor, logits: Logits, start: int, workspace: Workspace
) -> tuple[Tensor, Tensor | None, Bend | None]:
    """Bend first where a row maximum or a weight is that of the bent logits.

    Returns:
        The logits, the slope of the bend or ``None``, and the bend that is still to do or ``None``.
    """
    if logits.bend is None or not (logits.needs_maximum or logits.log_weight_n is not None):
        return logit_TB, None, logits.bend
    torch_steps.leave_out_(logit_TB, column_KB)
    logit_TB = logit_TB.float()
    slope_TB = torch_steps.bend_(logit_TB, logits.bend, workspace)
    logits.weigh_(logit_TB, start)
    if logits.per_identity > 1:
        logit_TB.masked_fill_(logit_TB <= torch_steps.LEFT_OUT, -torch.inf)
    return logit_TB, slope_TB, None


def _largest(logit_TB: Tensor, column_KB: Tensor) -> Tensor:
    """Largest negative logit of each column of a tile, ``_NO_LOGIT`` where it has none."""
    torch_steps.leave_out_(logit_TB, column_KB)
    return logit_TB.amax(0).float().clamp(min=_NO_LOGIT)
