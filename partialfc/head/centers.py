"""Class centers as rows of a matrix: their first values, and the own ones of a batch.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, K = centers of an
identity, D = embedding.
"""

import torch
from torch import Tensor

from partialfc.head.rows.formats import decode
from partialfc.head.rows.rules import States
from partialfc.head.sampling import NOT_LOCAL, Sample
from partialfc.head.tiles.torch_steps import take_rows
from partialfc.keyed import key
from partialfc.numerics import unit

_CENTER_STD = 0.01
"""Standard deviation of an element before the first step, as in arcface_torch."""
_INITIAL_BLOCK = 1024
"""Rows drawn from one generator; a constant, so that it never depends on the sharding."""


def fill_initial_(centers: Tensor, rows: range, *, seed: int, device: torch.device) -> None:
    """Fill centers [len(rows), D] with N(0, 0.01²), a function of seed and global row.

    A block of rows is drawn at a time. The values differ between CPU and GPU, whose generators are
    not the same, so ``device`` is that of the run wherever the centers lie.
    """
    dim, generator = centers.shape[1], torch.Generator(device)
    first_block = rows.start // _INITIAL_BLOCK
    for block in range(first_block, -(-rows.stop // _INITIAL_BLOCK)):
        generator.manual_seed(key(seed, "centers", block))
        drawn = torch.randn(_INITIAL_BLOCK, dim, generator=generator, device=device)
        start = block * _INITIAL_BLOCK
        low, high = max(start, rows.start), min(start + _INITIAL_BLOCK, rows.stop)
        part = drawn[low - start : high - start].mul_(_CENTER_STD)
        centers[low - rows.start : high - rows.start] = part


def stored_centers(centers_CD: Tensor, states: States) -> Tensor:
    """Return a rank's centers as fp32 rows on the CPU, whatever their format; states as in
    ``RowOptimizer.states()``."""
    return decode(centers_CD.detach(), states.get("centers_scale")).cpu()


def expand(sample: Sample, per_identity: int) -> Sample:
    """Return a sample of identities as one of their rows; targets are an identity's first row."""
    if per_identity == 1:
        return sample
    rows = sample.rows
    if rows is not None:
        every_K = torch.arange(per_identity, device=rows.device)
        rows = (rows.unsqueeze(1) * per_identity + every_K).flatten()
    local_B = sample.target_B != NOT_LOCAL
    return Sample(rows, torch.where(local_B, sample.target_B * per_identity, NOT_LOCAL))


def own_centers(
    centers_CD: Tensor, sample: Sample, query_BD: Tensor, per_identity: int
) -> tuple[Tensor, Tensor]:
    """Return the center [B, D] of each row's own identity and its place in the sample [B].

    Of K centers it is the nearest to the query. fp32, of any length; zero and ``NOT_LOCAL`` where
    another rank has it.
    """
    local_B = sample.target_B != NOT_LOCAL
    if not len(centers_CD) or (sample.rows is not None and not len(sample.rows)):
        return centers_CD.new_zeros(query_BD.shape, dtype=torch.float32), sample.target_B
    every_K = torch.arange(per_identity, device=query_BD.device)
    place_BK = sample.target_B.clamp(min=0).unsqueeze(1) + every_K
    row_BK = place_BK if sample.rows is None else sample.rows[place_BK]
    own_KD = take_rows(centers_CD, row_BK.flatten(), 0, row_BK.numel()).float()
    if per_identity == 1:
        return torch.where(local_B.unsqueeze(1), own_KD, 0.0), sample.target_B
    own_BKD = own_KD.view(*row_BK.shape, -1)
    unit_BKD = unit(own_KD)[0].view_as(own_BKD)
    which_B = (unit_BKD @ query_BD.float().unsqueeze(2)).squeeze(2).argmax(1)
    every_B = torch.arange(len(which_B), device=which_B.device)
    own_BD = torch.where(local_B.unsqueeze(1), own_BKD[every_B, which_B], 0.0)
    return own_BD, torch.where(local_B, sample.target_B + which_B, NOT_LOCAL)
