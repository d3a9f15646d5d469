"""Buffers that the tiles of all steps use again."""

import torch
from torch import Tensor


class Workspace:
    """Named buffers that grow to the largest size asked for and stay.

    A fresh tensor of a few megabytes costs the operating system's page faults, which take eight
    times as long as multiplying it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(
        self, name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer of a name as a contiguous tensor; what it holds is undefined."""
        count = 1
        for length in size:
            count *= length
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count or buffer.device != device:
            with torch.inference_mode(False):  # training may use it next
                buffer = torch.empty(count, dtype=dtype, device=device)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(size)
