"""Which implementation of a step a tensor gets: Triton kernels on a GPU that has them, or torch."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

FORCED = False
"""Tests set it, to run the kernels on CPU tensors in Triton's interpreter."""


def steps_for(tensor: Tensor) -> ModuleType:
    """Return the module with ``unit_rows`` and ``exponentials``."""
    kind = "triton" if has_kernels(tensor) else "torch"
    return import_module(f"partialfc.head.tiles.{kind}_steps")


def has_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels run where a tensor is."""
    return FORCED or (tensor.is_cuda and _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
