"""What a head is given, refused in words."""

import torch
from torch import Tensor


def refuse_batch(embeddings: Tensor, identities: Tensor, *, dim: int, device: torch.device) -> None:
    """Refuse a batch of this rank that has another shape, dtype or device than the head takes.

    Args:
        embeddings: [b, D].
        identities: int64 [b].
        dim: D.
        device: Of the head.

    Raises:
        ValueError: If it has.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise ValueError(
            f"embeddings must be [batch, {dim}], "
            f"got {list(embeddings.shape)}; embedding_dim of the head and of the backbone "
            "must be the same."
        )
    if identities.shape != embeddings.shape[:1] or identities.dtype != torch.int64:
        raise ValueError(
            f"identities must be int64 [{len(embeddings)}], one for each embedding, "
            f"got {identities.dtype} {list(identities.shape)}."
        )
    if embeddings.device != device:
        raise ValueError(
            f"embeddings must be on the device of the head, which is {device}, got them on "
            f'{embeddings.device}; construct the head with device="{embeddings.device}".'
        )
