"""What a head is given, refused in words."""

import math

import torch
from torch import Tensor

from partialfc.head.options import Kernels, Memory, Precision, Sets, Several, check_inter_class
from partialfc.head.rows.rules import RowRule
from partialfc.margins import Margin


def refuse_other_kinds(
    *,
    margin: object,
    optimizer: object,
    precision: object,
    memory: object,
    kernels: object,
    positives: object,
    sets: object,
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
        ("positives", positives, Several, "Several(most=8)"),
        ("sets", sets, Sets, "Sets(sizes=(10, 20))"),
    ):
        if isinstance(value, kind) or (value is None and name != "margin"):
            continue
        is_class = isinstance(value, type)
        got = f"the class {value.__name__}" if is_class else f"{value!r:.60}"  # type: ignore[attr-defined]
        more = f" Write {value.__name__}()." if is_class and issubclass(value, kind) else ""  # type: ignore
        if name == "optimizer" and not more:
            more = " It says how rows change; the head makes head.optimizer of it."
        raise TypeError(f"{name} must be a {kind.__name__}, as {example}, got {got}.{more}")


def refuse_center_losses(margin: Margin, center: float, inter_class: float) -> None:
    """Refuse weights of the losses beside the softmax that cannot be.

    Raises:
        ValueError: If one is negative or not finite, or ``margin`` cannot have the loss.
    """
    named = type(margin).__name__
    check_inter_class(inter_class, unit_centers=margin.unit_centers, margin=named)
    for name, weight in (("center_weight", center), ("inter_class_weight", inter_class)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}.")


def refuse_several(several: Several | None, margin: Margin, center_losses: float) -> None:
    """Refuse what looks at the one positive of a row, where rows have several or none.

    Args:
        several: What they are to the loss; ``None`` where each row has one.
        margin: What the logits are.
        center_losses: Largest weight of the losses beside the softmax.

    Raises:
        ValueError: With the name of the option first.
    """
    if several is None:
        return
    name, given = type(margin).__name__, f"positives = {several}"
    if margin.needs_positives:
        raise ValueError(
            f"{given}: {name} weighs the negatives or the margin of a row by its one positive. Use "
            "another margin, or rows of one identity each, without positives."
        )
    if center_losses:
        raise ValueError(
            f"{given}: center_weight and inter_class_weight are for rows of one identity each. Set "
            "them to 0."
        )
    if several.loss == "mean":
        return
    if margin.binary:
        raise ValueError(
            f'{given}: {name} asks each center a question of its own, and loss = "{several.loss}" '
            'is of one softmax. Use "mean".'
        )
    if margin.label_smoothing:
        remedy = "write it into the weights" if several.loss == "soft" else 'use loss = "mean"'
        raise ValueError(
            f"{given}: label_smoothing = {margin.label_smoothing} is shared out for one positive "
            f"at a time. Set it to 0, or {remedy}."
        )


def refuse_sets(sets: Sets | None, margin: Margin, num_identities: int) -> None:
    """Refuse sets that are not those of the identities, and what counts all negatives alike.

    Args:
        sets: The cut of the identities; ``None`` for one set.
        margin: What the logits are.
        num_identities: C.

    Raises:
        ValueError: With the name of the option first.
    """
    if sets is None:
        return
    if sum(sets.sizes) != num_identities:
        raise ValueError(
            f"sets.sizes = {sets.sizes} are {sum(sets.sizes)} identities, and num_identities is "
            f"{num_identities}. Give the size of every set, in the order of the identities."
        )
    if margin.label_smoothing:
        raise ValueError(
            f"sets = {sets}: label_smoothing = {margin.label_smoothing} is shared out to all "
            "sampled centers, also to those that a row leaves out. Set it to 0."
        )


def refuse_with_copies(copies: int, holders: range | None, *, overlap: bool) -> None:
    """Refuse what does not go with several copies of the centers.

    Args:
        copies: How often the centers are held.
        holders: Ranks that hold them, of a small head.
        overlap: Whether rows are updated beside the backbone's backward.

    Raises:
        ValueError: With the name of the option first.
    """
    if copies == 1:
        return
    if holders is not None:
        raise ValueError(
            f"ranks_per_copy with holders = {holders}: a head that lies on some of the ranks is "
            "held once. Leave one of them out."
        )
    if overlap:
        raise ValueError(
            "ranks_per_copy with overlap = true: gradients of centers would go between copies "
            "beside those of the backbone, and the ranks may not agree on which comes first. Leave "
            "one of them out."
        )


def refuse_batch(
    embeddings: Tensor,
    identities: Tensor,
    weights: Tensor | None,
    several: Several | None,
    *,
    dim: int,
    device: torch.device,
) -> None:
    """Refuse a batch of this rank that has another shape, dtype or device than the head takes.

    Args:
        embeddings: [b, D].
        identities: int64 [b], [b, 1], or [b, at most K].
        weights: Of their shape, if the loss of ``several`` is ``"soft"``.
        several: What rows of several identities are to the loss.
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
    most = 1 if several is None else several.most
    fits = identities.shape[:1] == embeddings.shape[:1] and (
        identities.ndim == 1 or (identities.ndim == 2 and 1 <= identities.shape[1] <= most)
    )
    if not fits or identities.dtype != torch.int64:
        columns = "1" if most == 1 else f"1 to {most}"
        or_more = f", one for each embedding, or [{len(embeddings)}, {columns}]"
        remedy = " Rows of K identities want positives=Several(most=K)."
        raise ValueError(
            f"identities must be int64 [{len(embeddings)}]{or_more}, "
            f"got {identities.dtype} {list(identities.shape)}."
            f"{remedy if identities.ndim == 2 and identities.shape[1] > most else ''}"
        )
    soft = several is not None and several.loss == "soft"
    if (weights is not None) != soft:
        have = "are given, and they are" if weights is not None else "are missing, which are"
        raise ValueError(f'weights {have} for positives=Several(loss="soft") and no other.')
    if weights is not None and not (
        weights.shape == identities.shape and weights.is_floating_point()
    ):
        raise ValueError(
            f"weights must be floats {list(identities.shape)}, one for each identity, got "
            f"{weights.dtype} {list(weights.shape)}."
        )
    if embeddings.device != device:
        raise ValueError(
            f"embeddings must be on the device of the head, which is {device}, got them on "
            f'{embeddings.device}; construct the head with device="{embeddings.device}".'
        )
