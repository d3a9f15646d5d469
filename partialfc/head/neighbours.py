"""The nearest centers of every center: an exact search over the shards of all ranks, in tiles.

Directions are rounded to whole numbers of eight bits, so small that fp32 adds up their products
without an error, from bf16 operands too, as int32 does. So a score depends on no tile, number of
ranks, library or device, and the lists are the same wherever they are made. Of equal scores the
smaller number wins. What is found is exact for these directions, whose cosines are those of the
centers to 0.001.

The centers of all ranks pass by in blocks, each gathered once, a few at a time. Beside the lists
there is one tile of scores, never one of all rows by all rows.

Shape suffixes: C = rows of this rank, D = embedding, G = groups of columns, H = columns found, J =
sets of identities, k = length of a list, M = groups found, q = rows of a tile that look, t = rows
of a tile that are looked at, T = those of one rank, W = ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from partialfc.distributed.ranks import Ranks, gather_rows, moved

NOBODY = -1
"""In a list, in the place of a row: there are no more."""

TILE_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of a tile in both directions, by the type of the device; no result depends on it."""

_BLOCKS_AT_ONCE = 8
"""Blocks that are looked at by a tile's rows while their directions are at hand, unless many ranks
make them larger."""
_GROUP = 32
"""Columns whose largest score is looked at before they are, and the fewest of a rank in a block."""
_SMALLEST = 1e-30
"""A row whose elements are all smaller has no direction: it is at 90 degrees to every other."""
_LOWEST = torch.finfo(torch.float32).min
_NO_KEY = -(1 << 63)
_LOW = 0xFFFFFFFF
_MOST_EXACT = 1 << 24
"""fp32 has all whole numbers up to here."""
_HAS_VNNI = torch.cpu._is_vnni_supported()
"""Whether the CPU adds up products of int8 in int32. Older ones saturate at 16 bits on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows that are searched.

    Attributes:
        centers_CD: Of this rank, as they are stored, on any device. Of more than D elements, the
            first D are looked at; lengths are not.
        dim: D.
        of_rank: Rows of every rank by their numbers in the whole head, one after the other.
        per_identity: Rows of an identity, which are no neighbours of each other.
        first_of_set: First rows of sets of identities; ``None`` for one set.
        share_JJ: bool, sets that may have the same people: no row of one is a neighbour of one of
            the other.
    """

    centers_CD: Tensor
    dim: int
    of_rank: Sequence[range]
    per_identity: int = 1
    first_of_set: Tensor | None = None
    share_JJ: Tensor | None = None


def nearest_rows(
    rows: Rows, most: int, ranks: Ranks, device: torch.device, *, first: int | None = None
) -> Tensor:
    """Return the nearest rows of other identities of each row of this rank, int32 [C, k], on a CPU.

    Numbers of the whole head, the nearest first, :data:`NOBODY` where there are no more.
    Collective: an all-gather for every block of rows. On a GPU, the host waits for each tile.

    Args:
        rows: Those searched.
        most: k, >= 1.
        ranks: Those that share the rows.
        device: Where it is computed.
        first: How many rows of this rank look, the first ones; ``None`` for all.
    """
    own, cut = rows.of_rank[ranks.rank][:first], Cut.of(device.type, ranks.size)
    size = cut.looking
    best_Ck = torch.full((len(own), most), _NO_KEY, dtype=torch.int64, device=device)
    blocks = _blocks(rows, cut.part, ranks, device)
    while some := list(islice(blocks, cut.at_once)):
        for start in range(0, len(own), size):
            looking = own[start : start + size]
            row_qD = rows.centers_CD[start : start + len(looking), : rows.dim]
            query_qD = directions(row_qD.to(device))
            query_qD = query_qD.to(_operand(device, rows.dim))
            for block in some:
                moved()
                score_qt = _products(query_qD, block.key_tD, block.reciprocal_t)
                _leave_out_(score_qt, looking, block, rows)
                _merge_(best_Ck[start : start + size], score_qt, block.number_t)
    list_Ck = torch.empty(best_Ck.shape, dtype=torch.int32)
    for start in range(0, len(own), size):
        key_qk = best_Ck[start : start + size]
        row_qk = torch.where(key_qk == _NO_KEY, NOBODY, _LOW - (key_qk & _LOW))
        list_Ck[start : start + size] = row_qk.int().cpu()
    return list_Ck


def directions(row_TD: Tensor) -> Tensor:
    """Return the directions of rows as whole numbers, int8: the largest is 127 at most.

    A row without a direction, or with an element that is not finite, is all zeros.

    Args:
        row_TD: Any float dtype, any length.
    """
    row_TD = row_TD.float()
    levels = min(127, math.isqrt(_MOST_EXACT // row_TD.shape[1]))
    largest_T1 = row_TD.abs().amax(1, keepdim=True)
    has_T1 = (largest_T1 > _SMALLEST) & largest_T1.isfinite()
    whole_TD = (row_TD * (levels / largest_T1)).round_()
    return torch.where(has_T1, whole_TD, 0.0).to(torch.int8)


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of a search that are at hand at a time; no result depends on it.

    Attributes:
        part: Of each rank in a block.
        block: Of all ranks in a block: a tile's, or more on many ranks, since ``part`` is a group
            at least.
        at_once: Blocks: as many rows as :data:`_BLOCKS_AT_ONCE` tiles have, or one block.
        looking: Rows of a tile that look: fewer where blocks are larger, so that a tile has as many
            scores.
    """

    part: int
    block: int
    at_once: int
    looking: int

    @classmethod
    def of(cls, device: str, ranks: int) -> "Cut":
        """Return the cut on a type of device and so many ranks."""
        size = TILE_ROWS[device]
        part = -(-size // (ranks * _GROUP)) * _GROUP
        block = part * ranks
        at_once = max(1, _BLOCKS_AT_ONCE * size // block)
        return cls(part, block, at_once, max(_GROUP, size * size // block))


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that are looked at: a part from each rank.

    Attributes:
        own: Numbers of this rank's part.
        place: Where its part is among them.
        number_t: int64 numbers on the device.
        absent_t: bool, numbers behind the last row of their rank; ``None`` where there are none.
        key_tD: Directions, as products take them.
        reciprocal_t: fp32, 1 by their lengths.
    """

    own: range
    place: slice
    number_t: Tensor
    absent_t: Tensor | None
    key_tD: Tensor
    reciprocal_t: Tensor


def _blocks(rows: Rows, part: int, ranks: Ranks, device: torch.device) -> Iterator[_Block]:
    """Yield all rows of all ranks in blocks of ``part`` of each."""
    longest, first = max(map(len, rows.of_rank)), rows.of_rank[ranks.rank].start
    for start in range(0, longest, part):
        own_TD = directions(rows.centers_CD[start : start + part, : rows.dim].to(device))
        block_TD = own_TD.new_zeros(part, rows.dim)
        block_TD[: len(own_TD)] = own_TD
        number_WT = torch.tensor([one.start for one in rows.of_rank]).unsqueeze(1)
        number_WT = number_WT + torch.arange(start, start + part)
        absent_WT = number_WT >= torch.tensor([one.stop for one in rows.of_rank]).unsqueeze(1)
        key_tD = gather_rows(block_TD, ranks)
        length_t = key_tD.float().square_().sum(1)
        yield _Block(
            own=range(first + start, first + start + part),
            place=slice(ranks.rank * part, (ranks.rank + 1) * part),
            number_t=number_WT.flatten().to(device),
            absent_t=absent_WT.flatten().to(device) if absent_WT.any() else None,
            key_tD=key_tD.to(_operand(device, rows.dim)),
            reciprocal_t=torch.where(length_t > 0, 1 / length_t.sqrt(), 0.0),
        )


def _operand(device: torch.device, dim: int) -> torch.dtype:
    """The fastest format that products of int8 are exact in."""
    if device.type == "cuda":
        return torch.bfloat16
    # torch 2.13's product of int8 on a CPU reads beyond its operands where rows have one element.
    return torch.int8 if _HAS_VNNI and dim > 1 else torch.float32


def _products(query_qD: Tensor, key_tD: Tensor, reciprocal_t: Tensor) -> Tensor:
    """fp32 products of whole numbers, up to 2**24 and without an error, by the keys' lengths."""
    if query_qD.dtype == torch.int8:
        return torch._int_mm(query_qD, key_tD.T).float().mul_(reciprocal_t)
    if query_qD.is_cuda:
        return torch.mm(query_qD, key_tD.T, out_dtype=torch.float32).mul_(reciprocal_t)
    return (query_qD @ key_tD.T).mul_(reciprocal_t)


def _leave_out_(score_qt: Tensor, looking: range, block: _Block, rows: Rows) -> None:
    """Set to -inf what is no neighbour: numbers without a row, the own identity, sets that may have
    the same people."""
    per, device = rows.per_identity, score_qt.device
    looking_q = torch.arange(looking.start, looking.stop, device=device)
    if block.absent_t is not None:
        score_qt.masked_fill_(block.absent_t, -torch.inf)
    if block.own.start < looking.stop + per and looking.start < block.own.stop + per:
        who_T = block.number_t[block.place] // per  # no identity has rows on two ranks
        is_own_qT = (looking_q // per).unsqueeze(1) == who_T
        score_qt[:, block.place].masked_fill_(is_own_qT, -torch.inf)
    if rows.first_of_set is not None and rows.share_JJ is not None:
        first = rows.first_of_set.to(device)
        set_q, set_t = (
            torch.bucketize(one, first, right=True) - 1 for one in (looking_q, block.number_t)
        )
        share_qJ = rows.share_JJ.to(device)[set_q]
        score_qt.masked_fill_(share_qJ[:, set_t], -torch.inf)


def _merge_(best_qk: Tensor, score_qt: Tensor, number_t: Tensor) -> None:
    """Put the columns of a tile that belong there into the lists of the best so far.

    Few columns of a tile do once the lists are filled, so groups are looked at by their largest
    score first. While a list is not filled, the k-th largest of these bounds the k-th largest score
    from below.

    Args:
        best_qk: int64 keys in descending order; changed in place.
        score_qt: fp32.
        number_t: int64 numbers of the columns.
    """
    most = best_qk.shape[1]
    group_qGt = score_qt.view(len(score_qt), -1, _GROUP)
    largest_qG = group_qGt.amax(2)
    bound_q = _score_of(best_qk[:, -1])
    if largest_qG.shape[1] >= most and bool((bound_q == -torch.inf).any()):  # host sync
        bound_q = bound_q.maximum(largest_qG.topk(most, sorted=False).values.amin(1))
    bound_q = bound_q.clamp(min=_LOWEST)  # -inf is what is left out
    query_M, group_M = (largest_qG >= bound_q.unsqueeze(1)).nonzero(as_tuple=True)  # host sync
    score_MG = group_qGt[query_M, group_M]
    group_H, within_H = (score_MG >= bound_q[query_M].unsqueeze(1)).nonzero(as_tuple=True)
    if not len(group_H):
        return
    query_H = query_M[group_H]
    number_H = number_t[group_M[group_H] * _GROUP + within_H]
    count_q = query_H.bincount(minlength=len(best_qk))
    first_q = count_q.cumsum(0) - count_q
    nth_H = torch.arange(len(query_H), device=query_H.device) - first_q[query_H]
    found = best_qk.new_full((len(best_qk), int(count_q.max())), _NO_KEY)  # host sync
    found[query_H, nth_H] = _key_of(score_MG[group_H, within_H], number_H)
    best_qk.copy_(torch.cat([best_qk, found], dim=1).topk(most).values)


def _key_of(score_H: Tensor, number_H: Tensor) -> Tensor:
    """int64 that orders by the larger fp32 score, then by the smaller number, and has both."""
    bits_H = (score_H + 0.0).view(torch.int32)  # -0 becomes 0
    return (_in_order(bits_H).long() << 32) | (_LOW - number_H)


def _score_of(key_q: Tensor) -> Tensor:
    """The score of a key; -inf of none."""
    score_q = _in_order((key_q >> 32).int()).view(torch.float32)
    return torch.where(key_q == _NO_KEY, -torch.inf, score_q)


def _in_order(bits_H: Tensor) -> Tensor:
    """The bits of fp32 as int32 of the same order, or back."""
    return torch.where(bits_H >= 0, bits_H, bits_H ^ 0x7FFFFFFF)
