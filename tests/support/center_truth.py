"""The losses on class centers, written out."""

import torch
import torch.nn.functional as F

from tests.support import loss_truth
from tests.support.margin_heads import IDENTITIES, settings_of


def truth_of(head, embeddings, labels, left_out=None):
    """Loss and gradients: the margin's equation and two terms written out; ``left_out`` [B, C]."""
    embeddings = embeddings.double().requires_grad_()
    centers = head.centers.detach().double().requires_grad_()
    settings = settings_of(head, labels)
    if left_out is not None and settings["sampled"] is not None:
        left_out = left_out[:, settings["sampled"]]
    settings["left_out"] = left_out
    loss = loss_truth.loss_of(head.margin, embeddings, centers, labels, **settings)
    per, dim = head.centers_per_identity, head.embedding_dim
    near = F.normalize(centers[:, :dim])
    query = F.normalize(embeddings)
    own_rows = labels.unsqueeze(1) * per + torch.arange(per)
    which = (near[own_rows] @ query.unsqueeze(2)).squeeze(2).argmax(1)
    own = near[labels * per + which]
    loss = loss + head.center_weight * (1 - (query * own).sum(1)).mean()
    if head.inter_class_weight:
        sampled = settings["sampled"]
        sampled = torch.arange(IDENTITIES) if sampled is None else sampled
        rows = (sampled.unsqueeze(1) * per + torch.arange(per)).flatten()
        cosine = own @ near[rows].T
        alike = (rows // per) == labels.unsqueeze(1)
        if left_out is not None:
            alike = alike | left_out.repeat_interleave(per, 1)
        nearest = cosine.masked_fill(alike, -torch.inf).amax(1)
        loss = loss + head.inter_class_weight * nearest.mean()
    loss.backward()
    return loss.detach(), embeddings.grad, centers.grad
