"""Copies between the host and a GPU that the host does not wait for.

A GPU copies by itself what lies in page-locked memory only. torch keeps such memory for the next
copy of the same size, and until the GPU is done with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; no host synchronisation from the host to a GPU."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def to_host(value: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; return a function that waits for the copy and returns it.

    The copy is behind what the current stream has been given so far, and the wait is for no more.
    """
    if not value.is_cuda:
        return lambda: value
    there = torch.empty_like(value, device="cpu", pin_memory=True)
    there.copy_(value, non_blocking=True)
    return partial(_arrived, there, torch.cuda.current_stream(value.device).record_event())


def _arrived(there: Tensor, copied: Any) -> Tensor:
    copied.synchronize()
    return there
