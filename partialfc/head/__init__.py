"""The sharded, sampled softmax over class centers; the data flow is in :mod:`.partial_fc`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialfc.head.options import Kernels, Memory, Nearest, Precision, Several
    from partialfc.head.partial_fc import PartialFC

__all__ = ["Kernels", "Memory", "Nearest", "PartialFC", "Precision", "Several"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: settings use :mod:`.plan` and
    :mod:`.options` without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'partialfc.head' has no attribute {name!r}")
    module = "partial_fc" if name == "PartialFC" else "options"
    return getattr(import_module(f"partialfc.head.{module}"), name)
