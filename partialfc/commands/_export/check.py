"""An exported model beside the original, on real images.

Shape suffixes: N = images, D = embedding.
"""

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
from partialfc.protocols.verification import verify
from partialfc.runtime.process import Runtime

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """What the original makes of the images, and its accuracy."""

    embeddings_ND: NDArray[np.float64]
    accuracy: float


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
    return Original(found, verify(found, pairs.same).accuracy)


def check(
    run: Run, pairs: Pairs, truth: Original, *, size: int, flip: bool, inside: bool
) -> dict[str, Any]:
    """Return the smallest cosine to the original's embeddings, and both accuracies."""
    found = embed(run, pairs, size, flip, inside)
    unit_ND = unit_rows(found, "exported"), unit_rows(truth.embeddings_ND, "original")
    return {
        "cosine": float((unit_ND[0] * unit_ND[1]).sum(axis=1).min()),
        "accuracy": verify(found, pairs.same).accuracy,
        "original": truth.accuracy,
        "images": len(found),
    }


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
