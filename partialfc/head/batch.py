"""What the loss of a forward pass is computed from.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, C = rows of the
centers at hand, D = embedding, and in a query its bias, n = sampled rows, P = pairs of a row
and one of its positives, 1 = one for each row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import Ranks
from partialfc.distributed.shares import Shares
from partialfc.head.across_copies import AcrossCopies
from partialfc.head.options import Compute
from partialfc.head.plan import Path
from partialfc.head.row_set import RowSet
from partialfc.head.several import Labels
from partialfc.head.tiles.set_mask import SetMask
from partialfc.head.tiles.workspace import Workspace
from partialfc.margins import Margin, State
from partialfc.numerics import operand_dtype, unit


@dataclass(frozen=True, slots=True)
class Queries:
    """This rank's embeddings as the margin wants to multiply them.

    Attributes:
        unit_bD: fp32 unit embeddings.
        reciprocal_b1: 1 / their lengths; 0 where there is none.
        norm_b: Their lengths.
        gain: Length of the queries, [b] or a scalar; ``None`` for 1.
        query_bD: Unit embeddings times the gain, with a 1 for the bias if there is one, in the
            operand dtype.
    """

    unit_bD: Tensor
    reciprocal_b1: Tensor
    norm_b: Tensor
    gain: Tensor | None
    query_bD: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, margin: Margin, state: State, compute: Compute) -> "Queries":
        """Return the queries of embeddings [b, D], any float dtype and length."""
        embedding_bD = embeddings.float()
        unit_bD, reciprocal_b1 = unit(embedding_bD)
        norm_b = torch.linalg.vector_norm(embedding_bD, dim=1)
        gain = margin.gain(norm_b, state)
        query_bD = unit_bD if gain is None else unit_bD * gain.view(-1, 1)
        if margin.bias:
            query_bD = F.pad(query_bD, (0, 1), value=1.0)
        return cls(unit_bD, reciprocal_b1, norm_b, gain, query_bD.to(operand_dtype(compute)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The batch of one forward pass with its sampled centers; no gradient flows through it.

    It is the global one, or, where there are several copies of the centers, that of a copy's ranks.

    Attributes:
        queries: Of this rank.
        query_BD: Of all ranks.
        norm_B: Lengths of all embeddings; ``None`` unless the margin needs them.
        centers_CD: Class centers at hand, as they are stored.
        rows: The sampled ones.
        labels: Whom the rows name.
        mask: Sets of identities that rows leave out; ``None`` for none.
        target_P: Place among the sampled of the first row of each own identity, or ``NOT_LOCAL``.
        log_weight_n: fp32, log of how many rows each sampled one stands for; ``None``: for itself.
        margin: What the logits are.
        state: What the margin remembers; the batch's own copy.
        step: Optimizer steps taken so far.
        draw_key: Of the margin's random numbers.
        center_weight: Of the center loss; 0 for none.
        inter_class_weight: Of the inter-class loss; 0 for none.
        compute: Precision of the matrix products.
        reduce_dtype: In which the embeddings' gradients are summed over ranks.
        path: Which code computes them.
        ranks: Those that share the centers: of a copy of them.
        shares: b of each of these.
        across_copies: The batch among those of all copies of the centers.
        want_gradient: Whether backward may follow.
        want_pull: Whether it wants the gradient of the embeddings.
        keep_bytes: Most memory of the exponentials kept for pass 2.
        workspace: Buffers of the tiles.
    """

    queries: Queries
    query_BD: Tensor
    norm_B: Tensor | None
    centers_CD: Tensor
    rows: RowSet
    labels: Labels
    mask: SetMask | None
    target_P: Tensor
    log_weight_n: Tensor | None
    margin: Margin
    state: State
    step: int
    draw_key: int
    center_weight: float
    inter_class_weight: float
    compute: Compute
    reduce_dtype: torch.dtype
    path: Path
    ranks: Ranks
    shares: Shares
    across_copies: AcrossCopies
    want_gradient: bool
    want_pull: bool
    keep_bytes: int
    workspace: Workspace
