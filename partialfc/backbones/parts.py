"""What the backbones share: recomputed blocks, BatchNorm and the precision of the end."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of BatchNorm1d, 2d and SyncBatchNorm
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """Return ``block(x)``.

    With ``recompute``, backward computes the activations inside the block again instead of keeping
    them: the same numbers and random draws, and BatchNorm counts the batch once.
    """
    y: Tensor = recomputed(block, block, x) if recompute else block(x)
    return y


def recomputed(run: Callable[..., Any], block: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """Return ``run(*arguments, **keywords)``, which is all that ``block`` does, for backward to
    compute again; without gradients it is only run."""
    if not torch.is_grad_enabled():
        return run(*arguments, **keywords)
    if torch.compiler.is_compiling():  # the compiler keeps updates of buffers out of backward
        return checkpoint(run, *arguments, use_reentrant=False, **keywords)
    contexts = nullcontext(), _FrozenStatistics(block)  # of forward and of recomputation
    return checkpoint(run, *arguments, use_reentrant=False, context_fn=lambda: contexts, **keywords)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, whose network counts its batches: see :func:`count_batch`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [b, C, H, W] normalised, by its own statistics in training mode."""
        assert self.momentum is not None
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parameters, self.training, self.momentum, self.eps)


def count_batch(network: nn.Module) -> None:
    """Count a batch in every :class:`BatchNorm2d` that is in training mode, in one launch on a GPU.

    torch's own count is a launch a layer, for a number that nobody reads where a momentum is given.
    """
    counts = []
    for one in network.modules():
        if isinstance(one, BatchNorm2d) and one.training and one.num_batches_tracked is not None:
            counts.append(one.num_batches_tracked)
    if counts:
        torch._foreach_add_(counts, 1)


def run_in_weight_dtype(x: Tensor, *layers: nn.Module) -> Tensor:
    """Apply ``layers`` to ``x`` outside autocast, in the dtype of their weights: fp32 in training.

    arcface_torch does so with the layers that make the embedding.
    """
    autocast_off: AbstractContextManager[None] = (
        nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    )
    with autocast_off:
        x = x.to(next(layers[0].parameters()).dtype)
        for layer in layers:
            x = layer(x)
        return x


class _FrozenStatistics:
    """Context in which BatchNorm normalises by the batch but does not count it.

    It is entered in every backward through the block. The layers keep their buffers, because a
    recomputed layer must save as many tensors as the first time.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [
            (norm, norm.momentum, norm.num_batches_tracked)
            for norm in block.modules()
            if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None
        ]

    def __enter__(self) -> None:
        for norm, _, batches in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, batches.clone()

    def __exit__(self, *_: object) -> None:
        for norm, momentum, batches in self._norms:
            norm.momentum, norm.num_batches_tracked = momentum, batches
