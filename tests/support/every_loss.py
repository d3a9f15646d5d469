"""Every loss on embeddings, and a batch for it."""

import torch

from partialfc.losses import Contrastive, Triplet, Uniformity
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted

EVERY_LOSS = {
    "semi-hard": Triplet(margin=0.3),
    "batch-hard": Triplet(margin=1.0, mining="batch_hard"),
    "contrastive": Contrastive(margin=1.2),
    "uniformity": Uniformity(sharpness=3),
}


def problem(identities=6, images=4, dim=8, seed=0):
    """A batch in which images of an identity are nearer to each other, but not always."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(images)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(identities, dim, generator=generator)
    noise = torch.randn(len(labels), dim, generator=generator)
    lengths = torch.linspace(0.5, 30, len(labels)).unsqueeze(1)
    return (centers[labels] + 1.2 * noise) * lengths, labels


def found_of(loss, embeddings, labels, weight=1.0):
    own = embeddings.clone().requires_grad_()
    value = EmbeddingLosses({"it": Weighted(loss, weight)})(own, labels)
    value.backward()
    return value.detach(), own.grad
