"""Losses on class centers, beside the softmax: embeddings to their own one, near ones apart.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = query, n =
sampled rows, T = rows of a tile, 1 = one a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import Ranks, max_over_ranks, sum_over_ranks
from partialfc.head.centers import own_centers
from partialfc.head.row_set import RowSet
from partialfc.head.sampling import NOT_LOCAL
from partialfc.head.tiles.parts import Logits, Pull
from partialfc.head.tiles.passes import unit_keys
from partialfc.head.tiles.products import scaled_products
from partialfc.head.tiles.torch_steps import leave_out_
from partialfc.head.tiles.workspace import Workspace
from partialfc.numerics import operand_dtype, precision, unit


@dataclass(frozen=True, slots=True)
class CenterTerm:
    """A loss beside the softmax.

    Attributes:
        loss: Scalar, the same on all ranks.
        pulls: Its derivatives by the keys of this rank.
        by_query_BD: This rank's share of that by the queries; ``None`` for zero.
    """

    loss: Tensor
    pulls: list[Pull]
    by_query_BD: Tensor | None = None


def center_loss(
    query_BD: Tensor, own_BD: Tensor, target_B: Tensor, dim: int, ranks: Ranks
) -> CenterTerm:
    """Mean of 1 - cos(theta) of each row and its own center, in [0, 2].

    Half the squared distance of the two unit vectors: center loss
    (https://doi.org/10.1007/978-3-319-46478-7_31) on the sphere, with the centers of the softmax.
    Collective: one all-reduce of a scalar.

    Args:
        query_BD: Any float dtype and length.
        own_BD: fp32 key of each row's own identity, 0 where another rank has it.
        target_B: Place of that key among the sampled, or ``NOT_LOCAL``.
        dim: Elements of a query that are its embedding.
        ranks: Those that share the centers.
    """
    # Its derivatives by hand: autograd does nothing in inference mode.
    local_B1, pad = (target_B != NOT_LOCAL).unsqueeze(1), query_BD.shape[1] - dim
    (unit_BD, far_B1), (key_BD, near_B1) = unit(query_BD[:, :dim]), unit(own_BD[:, :dim])
    cosine_B1 = (unit_BD * key_BD).sum(1, keepdim=True)
    loss = torch.where(local_B1, 1 - cosine_B1, 0.0).mean()
    share_B1 = local_B1 / len(query_BD)
    by_query_BD = (unit_BD * cosine_B1 - key_BD) * (far_B1 * share_B1)
    by_key_BD = (key_BD * cosine_B1 - unit_BD) * (near_B1 * share_B1)
    pull = Pull(target_B, torch.ones_like(share_B1[:, 0]), F.pad(by_key_BD, (0, pad)))
    return CenterTerm(sum_over_ranks(loss, ranks), [pull], F.pad(by_query_BD, (0, pad)))


def inter_class_loss(
    own_BD: Tensor,
    target_B: Tensor,
    centers_CD: Tensor,
    rows: RowSet,
    first_B: Tensor,
    logits: Logits,
    workspace: Workspace,
    ranks: Ranks,
) -> CenterTerm:
    """Mean cosine of the own center of each row and the nearest one of another identity.

    The exclusive regularisation of RegularFace (https://doi.org/10.1109/CVPR.2019.00123) with the
    identities of the batch for all identities, and the sampled centers to look among. 0 where only
    one identity is sampled. Collective: all-reduces of [B, D], [B] and [B, D + 1].

    Args:
        own_BD: fp32 unit key of each row's own identity, 0 where another rank has it.
        target_B: Place of that key among the sampled, or ``NOT_LOCAL``.
        centers_CD: This rank's class centers.
        rows: Sampled ones.
        first_B: Place in the sample of the first row of each own identity, or ``NOT_LOCAL``.
        logits: Precision of the products, K, and which sets of identities a row leaves out.
        workspace: Buffers of the tiles.
        ranks: Those that share the centers.
    """
    own_BD = sum_over_ranks(own_BD.clone(), ranks)
    query_BD = own_BD.to(operand_dtype(logits.compute))
    largest_B = torch.full_like(own_BD[:, 0], -torch.inf)
    place_B = torch.full_like(target_B, NOT_LOCAL)
    with precision(logits.compute, own_BD.device):
        for start, key_TD in unit_keys(query_BD, centers_CD, rows, logits, workspace):
            cosine_TB = scaled_products(key_TD, query_BD, 1.0)
            for number in range(logits.per_identity):
                row_B = first_B + number - start
                row_B = torch.where(target_B == NOT_LOCAL, NOT_LOCAL, row_B)
                leave_out_(cosine_TB, row_B.unsqueeze(0))
            if logits.mask is not None:
                logits.mask.leave_out_(cosine_TB, start)
            nearest_B, row_B = cosine_TB.max(0)
            nearer_B = nearest_B > largest_B
            largest_B = torch.where(nearer_B, nearest_B.float(), largest_B)
            place_B = torch.where(nearer_B, row_B + start, place_B)
    every_B = max_over_ranks(largest_B.clone(), ranks)
    exists_B = every_B > -torch.inf
    mine_B = exists_B & (largest_B == every_B)
    place_B = torch.where(mine_B, place_B, NOT_LOCAL)
    nearest_BD, _ = own_centers(centers_CD, rows, place_B, own_BD, 1)
    # Ranks that tie share the derivative.
    counted_BD = torch.cat([unit(nearest_BD)[0], mine_B.float().unsqueeze(1)], dim=1)
    counted_BD = sum_over_ranks(counted_BD, ranks)
    nearest_BD, ranks_B = counted_BD[:, :-1], counted_BD[:, -1]
    share_B = exists_B / (len(own_BD) * ranks_B.clamp(min=1))
    loss = ((own_BD * nearest_BD).sum(1) * share_B).sum()
    return CenterTerm(loss, [Pull(target_B, share_B, nearest_BD), Pull(place_B, share_B, own_BD)])
