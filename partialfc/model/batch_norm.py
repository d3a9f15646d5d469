"""BatchNorm's running statistics, which each rank keeps of its own batches, and their mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.distributed.ranks import Ranks


class Remembered:
    """Buffers as they were: a handful of launches on a GPU, however many there are.

    Args:
        buffers: Any floating dtypes, on one device.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        dtypes = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._buffers = [[one for one in buffers if one.dtype == dtype] for dtype in dtypes]
        self._before = [_flat(some) for some in self._buffers]

    def restore_where(self, bad: Tensor) -> None:
        """Write what they were where ``bad``, a scalar bool on the device, is true; no host
        synchronisation."""
        for some, before in zip(self._buffers, self._before, strict=True):
            kept = torch.where(bad, before, _flat(some))
            parts = torch.split(kept, [one.numel() for one in some])
            pairs = zip(parts, some, strict=True)
            torch._foreach_copy_(some, [part.view(one.shape) for part, one in pairs])


def _flat(buffers: Sequence[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return, by name, what a rank keeps of its own batches: BatchNorm's running statistics."""
    buffers = dict(module.named_buffers())
    return {
        name: value
        for name, value in module.state_dict().items()
        if name in buffers and value.is_floating_point()
    }


def mean_statistics(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return the mean of all ranks' statistics, in new tensors; the module is left as it is.

    They are moving averages, which are linear: the mean is what a rank would have that saw the
    batches of all. Collective: one all-reduce, none with one rank.
    """
    return mean_over_ranks(statistics(module), ranks)


def mean_over_ranks(own: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the mean of what each rank has under these names; see :func:`mean_statistics`."""
    if ranks.size == 1 or not own:
        return own
    flat = torch.cat([value.double().flatten() for value in own.values()])
    dist.all_reduce(flat, group=ranks.group)
    parts = torch.split(flat / ranks.size, [value.numel() for value in own.values()])
    return {
        name: part.view_as(value).to(value.dtype)
        for (name, value), part in zip(own.items(), parts, strict=True)
    }


@contextmanager
def with_mean_statistics(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Give all ranks the same statistics, their mean, and at the end each its own again.

    So training goes on with the same bits, however often it is measured. Collective, as
    :func:`mean_statistics`.
    """
    live, means = statistics(module), mean_statistics(module, ranks)
    own = {name: value.clone() for name, value in live.items()}
    for name, value in live.items():
        value.copy_(means[name])
    try:
        yield
    finally:
        for name, value in live.items():
            value.copy_(own[name])
