"""What the device of a head can do, as :mod:`partialfc.head.plan` wants to know it."""

from functools import cache
from importlib.util import find_spec

import torch

from partialfc.head.plan import Machine
from partialfc.head.tiles.cards import DEFAULT, H200, Card, card_for

FORCED = False
"""Tests set it, to run the kernels on CPU tensors in Triton's interpreter."""

ASSUMED: Card | None = None
"""Tools and tests set it, to compile or cut tiles for a card that is not there."""


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


def card_of(device: torch.device | None) -> Card:
    """Return the card whose shapes the fused kernels take; an H200 where there is no GPU."""
    if ASSUMED is not None:
        return ASSUMED
    return H200 if device is None or device.type != "cuda" else _card_of(device)


@cache
def _card_of(device: torch.device) -> Card:
    capability = torch.cuda.get_device_capability(device)
    return card_for(capability, torch.cuda.get_device_name(device)) or DEFAULT


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
