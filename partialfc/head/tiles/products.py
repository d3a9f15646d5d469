"""The matrix products of the head in its compute precision: operands may be bf16, sums are fp32.

Shape suffixes: B = rows of the gathered batch, D = embedding, T = rows of a tile.
"""

import torch
from torch import Tensor


def scaled_products(
    key_TD: Tensor, query_BD: Tensor, scale: float, out_TB: Tensor | None = None
) -> Tensor:
    """Return scale * product [T, B]: fp32, or bf16 where the device has no other of bf16.

    It is in ``out_TB``, of the operands' dtype, if that is given and has the dtype of the result.
    """
    if key_TD.dtype == torch.bfloat16 and key_TD.is_cuda:
        size = len(key_TD), len(query_BD)
        unread = key_TD.new_empty((), dtype=torch.float32).expand(size)
        # The scale is the product's own: another pass over fp32 logits costs a third of a tile.
        return torch.addmm(unread, key_TD, query_BD.T, torch.float32, beta=0, alpha=scale)
    logit_TB = key_TD.new_empty(len(key_TD), len(query_BD)) if out_TB is None else out_TB
    return torch.addmm(logit_TB, key_TD, query_BD.T, beta=0, alpha=scale, out=logit_TB)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, keep: bool = True) -> None:
    """``total += left @ right`` in place, fp32; without ``keep``, ``total = left @ right``."""
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=int(keep), out=total)
        return
    product = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left @ right
    if keep:
        total.add_(product)
    else:
        total.copy_(product)
