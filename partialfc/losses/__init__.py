"""Losses on the embeddings of a batch, beside the softmax of the head.

They compare embeddings with each other, so they want batches in which identities repeat.
"""

from partialfc.definitions import losses as definitions
from partialfc.losses.base import EmbeddingLoss, Lesson, Pairs
from partialfc.losses.contrastive import Contrastive
from partialfc.losses.distillation import Distillation
from partialfc.losses.triplet import Triplet
from partialfc.losses.uniformity import Uniformity

LOSSES: dict[str, type[EmbeddingLoss]] = {
    name: globals()[definition.__name__] for name, definition in definitions.LOSSES.items()
}
"""Every loss that needs a batch alone, by its name in the settings."""

__all__ = [
    "LOSSES",
    "Contrastive",
    "Distillation",
    "EmbeddingLoss",
    "Lesson",
    "Pairs",
    "Triplet",
    "Uniformity",
]
