"""What a head is given, refused in words."""

import torch
from torch import Tensor

from partialfc.head.options import Kernels, Memory, Precision
from partialfc.head.rows.rules import RowRule
from partialfc.margins import Margin


def refuse_other_kinds(
    *, margin: object, optimizer: object, precision: object, memory: object, kernels: object
) -> None:
    """Refuse arguments of ``PartialFC`` that are of another type; all but the margin may be
    ``None``.

    Raises:
        TypeError: With the name of the argument first, and what is wanted.
    """
    for name, value, kind, example in (
        ("margin", margin, Margin, "ArcFace()"),
        ("optimizer", optimizer, RowRule, "RowSGD(lr=0.1)"),
        ("precision", precision, Precision, 'Precision(compute="bf16")'),
        ("memory", memory, Memory, "Memory(keep_mib=64)"),
        ("kernels", kernels, Kernels, "Kernels(fused=True)"),
    ):
        if isinstance(value, kind) or (value is None and name != "margin"):
            continue
        is_class = isinstance(value, type)
        got = f"the class {value.__name__}" if is_class else f"{value!r:.60}"  # type: ignore[attr-defined]
        more = f" Write {value.__name__}()." if is_class and issubclass(value, kind) else ""  # type: ignore
        if name == "optimizer" and not more:
            more = " It says how rows change; the head makes head.optimizer of it."
        raise TypeError(f"{name} must be a {kind.__name__}, as {example}, got {got}.{more}")


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
