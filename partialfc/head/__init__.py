"""The sharded, sampled softmax over class centers; the data flow is in :mod:`.partial_fc`."""

from partialfc.head.partial_fc import PartialFC

__all__ = ["PartialFC"]
