"""Settings that an earlier version wrote into a run's folder, and that a file may not have now.

A run writes all its settings down, those that it had no use for too. Where a version refuses such a
one, the runs of the version before are still to be opened.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def without_idle(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run wrote without those that did nothing and are refused now.

    They are the flip of a measurement on arrays, and the negatives of a head that uses all class
    centers in every stage.

    Args:
        settings: As its config.toml has them.
    """
    found = dict(settings)
    if _in(settings, "data").get("kind") == "arrays":
        found = _without(found, "verification", "flip")
    listed = settings.get("stages")
    stages = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if "head" in found and _all_centers(found, stages, "head"):
        found = _without(found, "head", "negatives", "nearest")
    if heads := _in(found, "heads"):
        for name in heads:
            if _all_centers(found, stages, "heads", name):
                heads = _without(heads, name, "negatives", "nearest")
        found["heads"] = heads
    return found


def _all_centers(
    settings: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], *section: str
) -> bool:
    """Whether each step has all class centers of a head."""
    rate = _in(settings, *section).get("sample_rate", 1)
    return all(_in(one, *section).get("sample_rate", rate) == 1 for one in stages or [{}])


def _in(settings: Mapping[str, Any], *section: str) -> Mapping[str, Any]:
    """A section of settings that nobody has checked; empty where there is none."""
    for name in section:
        inner = settings.get(name)
        settings = inner if isinstance(inner, Mapping) else {}
    return settings


def _without(settings: Mapping[str, Any], section: str, *keys: str) -> dict[str, Any]:
    inner = settings.get(section)
    if not isinstance(inner, Mapping):
        return dict(settings)
    return {**settings, section: {key: inner[key] for key in inner if key not in keys}}
