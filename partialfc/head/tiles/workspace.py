"""Buffers that the tiles of all steps use again."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Workspace:
    """Named buffers that grow to the largest size asked for and stay.

    A fresh tensor of a few megabytes costs the operating system's page faults, which take eight
    times as long as multiplying it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._returned: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(
        self, name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer of a name as a contiguous tensor; what it holds is undefined."""
        count = math.prod(size)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count or buffer.device != device:
            with torch.inference_mode(False):  # training may use it next
                buffer = torch.empty(count, dtype=dtype, device=device)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(size)

    def lend(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """Return an fp32 tensor of one's own, until :meth:`take_back`; what it holds is undefined.

        It is one that was given back, if the last step had one of that size. If not, as much of
        other sizes is given up: together they are never more than what may be kept.
        """
        free = self._returned.get(size)
        if free and device.type == "cpu":
            return free.pop()
        wanted = 4 * math.prod(size)
        while wanted > 0 and self._returned:
            _, others = self._returned.popitem()
            wanted -= sum(tensor.nbytes for tensor in others)
        return torch.empty(size, device=device)

    def take_back(self, tensors: Iterable[Tensor]) -> None:
        """Lend these again, which nobody reads any more, and none of those before.

        A GPU has an allocator that does so.
        """
        self._returned = {}
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
                self._returned.setdefault((*tensor.shape,), []).append(tensor)
