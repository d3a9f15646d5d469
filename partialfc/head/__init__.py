"""The sharded, sampled softmax over class centers; the data flow is in :mod:`.partial_fc`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["PartialFC"]


def __getattr__(name: str) -> object:
    """Import the head when it is first asked for: settings ask :mod:`.plan` without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'partialfc.head' has no attribute {name!r}")
    from partialfc.head import partial_fc

    return getattr(partial_fc, name)
