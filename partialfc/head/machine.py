"""What the device of a head can do, as :mod:`partialfc.head.plan` wants to know it."""

from functools import cache
from importlib.util import find_spec

import torch

from partialfc.head.plan import Machine

FORCED = False
"""Tests set it, to run the kernels on CPU tensors in Triton's interpreter."""


def machine_of(device: torch.device) -> Machine:
    """Return what a device can do."""
    if device.type != "cuda":
        return Machine(device.type, FORCED)
    return Machine(
        "cuda",
        FORCED or _has_triton(),
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_name(device),
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
