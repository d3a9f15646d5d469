"""Losses on the embeddings of a batch, beside the softmax of the head.

They compare embeddings with each other, so they want batches in which identities repeat.
"""

from partialfc.losses.base import EmbeddingLoss, Pairs
from partialfc.losses.contrastive import Contrastive
from partialfc.losses.triplet import Triplet
from partialfc.losses.uniformity import Uniformity

LOSSES: dict[str, type[EmbeddingLoss]] = {
    "triplet": Triplet,
    "contrastive": Contrastive,
    "uniformity": Uniformity,
}
"""Every loss by its name in the settings."""

__all__ = ["LOSSES", "Contrastive", "EmbeddingLoss", "Pairs", "Triplet", "Uniformity"]
