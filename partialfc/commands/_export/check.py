"""An exported model beside the original, on real images.

It is the original if no embedding has a cosine below a bound to the original's, and if its accuracy
is not another one beyond what pairs can tell. Both answer the same N pairs at the original's
threshold; b pairs are right with the original alone and c with the file alone. Pairs on which both
are right or wrong say nothing, so the change of accuracy is (c - b) / N and the half of its
interval is ``z * sqrt(b + c - (c - b)**2 / N) / N`` (Agresti, "Categorical Data Analysis", on
matched pairs). One pair of a thousand that fell the other way is no change.

Shape suffixes: N = images, D = embedding, K = pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from partialfc.data.sets.pairs import Pairs
from partialfc.distributed.ranks import Ranks
from partialfc.evaluation.embedding import embed_images
from partialfc.protocols import unit_rows
from partialfc.protocols.verification import Verification, verify
from partialfc.runtime.process import Runtime

Z = 2.576
"""Of an interval of 99 %."""

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """What the original makes of the images, and its numbers."""

    embeddings_ND: NDArray[np.float64]
    numbers: Verification


def embed(run: Run, pairs: Pairs, size: int, flip: bool, inside: bool) -> NDArray[np.float64]:
    """Return embeddings [N, D] by a model that takes pixels as the exported files do."""

    def of_normalised(images: torch.Tensor) -> torch.Tensor:
        values = images.numpy()
        return torch.from_numpy(run(np.rint(values * 127.5 + 127.5) if inside else values))

    runtime = Runtime(Ranks(), torch.device("cpu"))
    images = pairs.images
    return embed_images(
        of_normalised, "--check", len(images), images.__getitem__, runtime, size=size, flip=flip
    )


def original(backbone: nn.Module, pairs: Pairs, size: int, flip: bool) -> Original:
    """Measure the backbone itself."""
    found = embed(
        lambda images: backbone(torch.from_numpy(images)).numpy(), pairs, size, flip, False
    )
    return Original(found, verify(found, pairs.same))


def check(
    run: Run, pairs: Pairs, truth: Original, *, size: int, flip: bool, inside: bool
) -> dict[str, Any]:
    """Return the smallest cosine to the original's embeddings, and the numbers of both.

    Returns:
        ``change`` of accuracy and the half ``width`` of its interval, as above; ``lost`` and
        ``won``, pairs; ``accuracy`` and ``original``, ten-fold; ``threshold_at_far`` of the file.
    """
    found_ND = embed(run, pairs, size, flip, inside)
    unit_ND = unit_rows(found_ND, "exported"), unit_rows(truth.embeddings_ND, "original")
    numbers, threshold = verify(found_ND, pairs.same), truth.numbers.threshold
    right_K, was_right_K = (
        ((rows_ND[0::2] * rows_ND[1::2]).sum(1) > threshold) == pairs.same for rows_ND in unit_ND
    )
    lost, won = int((was_right_K & ~right_K).sum()), int((right_K & ~was_right_K).sum())
    change, width = paired(lost, won, len(pairs.same))
    return {
        "cosine": float((unit_ND[0] * unit_ND[1]).sum(axis=1).min()),
        "change": change,
        "width": width,
        "lost": lost,
        "won": won,
        "accuracy": numbers.accuracy,
        "original": truth.numbers.accuracy,
        "threshold_at_far": numbers.threshold_at_far,
        "images": len(found_ND),
    }


def paired(lost: int, won: int, total: int) -> tuple[float, float]:
    """Return the change of accuracy and half of its interval, of pairs that fell the other way."""
    change = (won - lost) / total
    return change, Z * math.sqrt(max(0.0, lost + won - (won - lost) ** 2 / total)) / total


def calibration(pairs: Pairs, size: int, inside: bool, most: int) -> NDArray[np.float32]:
    """Return up to ``most`` images, evenly from the set, as the exported model takes them."""
    chosen = np.unique(np.linspace(0, len(pairs.images) - 1, most).astype(np.int64))
    kept: list[NDArray[np.float32]] = []

    def keep(images: NDArray[np.float32]) -> NDArray[np.float32]:
        kept.append(images.copy())
        return images[:, :1, 0, 0]

    subset = Pairs([pairs.images[i] for i in chosen], pairs.same[: len(chosen) // 2])
    embed(keep, subset, size, False, inside)
    return np.concatenate(kept)[: len(chosen)]
