"""One optimizer step: micro-batches, both backward passes, one verdict for every weight."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partialfc.config import Config
from partialfc.keyed import key
from partialfc.losses import Lesson
from partialfc.model.batch_norm import Remembered
from partialfc.model.build import Model
from partialfc.model.optimizer import clip, set_rate
from partialfc.numerics import is_finite
from partialfc.pinned import to_device


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step leaves to be recorded; scalars on the device, not yet read.

    Attributes:
        loss: Mean loss of the global batch.
        gradient_norm: Of the backbone, before clipping.
        skipped: 1.0 where loss or gradient is not finite and nothing was changed, else 0.0.
        loss_scale: Of fp16; 1 without it.
        terms: Losses beside the softmax, and those of each of several heads, without their weights.
    """

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor
    loss_scale: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def train_step(
    model: Model,
    config: Config,
    images: Tensor,
    identities: Tensor,
    rate: float,
    lesson_of: Callable[[Tensor, slice], Lesson] | None = None,
    weights: Tensor | None = None,
) -> Step:
    """Take one optimizer step on this rank's part of the global batch. Collective.

    The host waits for a GPU only where a head samples and was not told of the step before
    (:meth:`partialfc.model.heads.Heads.sample_step`, ahead). Where the loss or the gradient is not
    finite, the device itself leaves all weights and statistics as they are, on every rank.

    Args:
        model: What is trained.
        config: Accumulation, clipping and the rate of the centers.
        images: [b, 3, S, S] on the device.
        identities: int64 [b] of the run, or [b, K] of several; on any device.
        rate: Learning rate of the backbone.
        lesson_of: Returns what the teacher says of images that are these rows of the batch.
        weights: What each of the identities counts for, if the head wants to know; likewise.
    """
    heads, optimizer, scaler = model.heads, model.optimizer, model.scaler
    parts, step, ranks = config.optimizer.accumulation, heads.steps, heads.ranks
    set_rate(optimizer, rate)
    for name, route in heads.routes(config).items():
        factor = route.config.head.optimizer.lr_factor
        heads[name].optimizer.param_groups[0]["lr"] = rate * factor

    # Dropout and drop path are functions of seed, step and rank too, so that a resume repeats them.
    torch.manual_seed(key(config.run.seed, "dropout", step, ranks.rank))
    of_heads = (buffer for head in heads.values() for buffer in head.buffers())
    buffers = (*model.backbone.buffers(), *of_heads)
    before = Remembered([buffer for buffer in buffers if buffer.is_floating_point()])
    loss = torch.zeros((), device=images.device)
    terms: dict[str, Tensor] = {}
    shares = config.uneven_shares(ranks.size)
    if parts > 1:
        heads.sample_step(config, identities)
        shares = shares and shares.of_each(parts)
    identities = to_device(identities, images.device)
    weights = weights if weights is None else to_device(weights, images.device)
    pieces = zip(images.chunk(parts), identities.chunk(parts), strict=True)
    for number, (part, own) in enumerate(pieces, 1):
        rows = slice((number - 1) * len(part), number * len(part))
        lesson = lesson_of(part, rows) if lesson_of else None  # before there are activations
        with _gradients_stay_local(model, number < parts):
            embeddings = model.embed(part)
            counted = None if weights is None else weights[rows]
            part_loss, found = heads.loss(config, number - 1, embeddings, own, counted)
            one = own if own.ndim == 1 else own[:, 0]  # a teacher does not ask whom images show
            part_loss = part_loss + model.losses(embeddings, one, shares, lesson)
            part_loss = part_loss / parts
            scaler.scale(part_loss).backward()
        loss += part_loss.detach()
        for name, value in {**found, **model.losses.terms}.items():
            terms[name] = terms.get(name, 0) + value / parts

    if model.shards:
        model.shards.take_gradients()
    scaler.unscale_(optimizer)
    settings = config.optimizer
    norm = clip(optimizer, settings.clip_norm, model.shards, each=settings.clip_groups)
    skipped = 1.0 - is_finite(loss, norm).float()
    # As GradScaler tells an optimizer, but one verdict for backbone and centers, on all ranks.
    _tell(
        optimizer,
        grad_scale=None,
        found_inf=model.shards.near(skipped) if model.shards else skipped,
    )
    loss_scale = scaler.scale(torch.ones_like(loss))
    for head in heads.values():
        if not head.optimizer.overlaps:  # the verdict is known after the backbone's backward only
            _tell(head.optimizer, grad_scale=loss_scale, found_inf=skipped)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    before.restore_where(skipped > 0)  # they saw the bad batch already
    if model.average is not None:
        model.average.update(step, skipped)
    for head in heads.values():  # last: whatever follows on the device waits for the centers
        head.optimizer.step()
    return Step(loss, norm, skipped, loss_scale, terms)


def _tell(optimizer: Any, *, grad_scale: Tensor | None, found_inf: Tensor) -> None:
    """Both of torch's fused optimizers and ours read these two, on the device."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf


def _gradients_stay_local(model: Model, stay: bool) -> AbstractContextManager[None]:
    """DDP averages gradients once a step, in the backward of the last micro-batch."""
    if stay and isinstance(model.replica, DistributedDataParallel):
        local: AbstractContextManager[None] = model.replica.no_sync()
        return local
    return nullcontext()
