"""``stages.json`` in the folder of a run with stages: which steps each has, and what it changes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.records.lines import is_number, is_step
from partialfc.writing import read_text

STAGES = "stages.json"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage as a page shows it.

    Attributes:
        name: Of the stage.
        first, last: Steps of the run before it and at its end.
        epochs: Passes over its data.
        settings: By dotted key, those that are not the same in all stages.
    """

    name: str
    first: int
    last: int
    epochs: float
    settings: dict[str, Any]


def read_stages(folder: Path) -> list[StageRecord]:
    """Return the stages of a run, in turn; none if it has none or the file is damaged."""
    try:
        found = json.loads(read_text(folder / STAGES))["stages"]
        return [StageRecord(**entry) for entry in found if _is_sound(entry)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _is_sound(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == set(StageRecord.__slots__)
        and isinstance(entry["name"], str)
        and is_step(entry["first"])
        and is_step(entry["last"])
        and is_number(entry["epochs"])
        and isinstance(entry["settings"], dict)
    )
