"""Heads whose options are given one by one, as a test compares them."""

from dataclasses import fields

from partialfc import Kernels, Memory, PartialFC, Precision

_GROUPS = {"precision": Precision, "memory": Memory, "kernels": Kernels}


def flat_head(*arguments, **settings) -> PartialFC:
    """Return ``PartialFC(...)``, with the options of its groups by their own names."""
    groups = {}
    for name, group in _GROUPS.items():
        own = {field.name for field in fields(group)} & settings.keys()
        groups[name] = group(**{option: settings.pop(option) for option in own})
    return PartialFC(*arguments, **groups, **settings)
