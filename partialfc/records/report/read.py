"""What a run left in its folder, as the report wants it; whatever is missing is left out."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.data.names import NAMES, Names, read_names
from partialfc.errors import in_words
from partialfc.records.metrics import read_metrics
from partialfc.records.parts import parts_of
from partialfc.records.stages import StageRecord, read_stages
from partialfc.writing import read_text

Json = dict[str, Any]
_CHECKPOINTS = 50
"""That are listed; a run may have kept thousands."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """One run.

    Attributes:
        name: Of its folder.
        settings: By dotted key.
        metrics: Lines of metrics.jsonl.
        summary: summary.json, or nothing while it runs.
        curves: curves.json: ROC and histogram of each verification set.
        checkpoints: Step and bytes of the newest, oldest first.
        people: Names of the identities that it was trained on, if its data has names; by head, ""
            for the only one.
        stages: Of a run with stages.
        older: Checkpoints before those.
    """

    name: str
    settings: dict[str, Any]
    metrics: list[dict[str, float]]
    summary: Json
    curves: Json
    checkpoints: list[tuple[int, int]]
    people: dict[str, Names]
    stages: Sequence[StageRecord] = ()
    older: int = 0

    def values(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric."""
        found = [(r["step"], r[name]) for r in self.metrics if r.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]


def read_run(folder: Path) -> RunFiles:
    """Read what is there.

    Raises:
        ValueError: If the folder holds no run, or a file of it is damaged; the message names it.
    """
    config = folder / "config.toml"
    if not config.is_file():
        raise ValueError(f"{folder}: it holds no run: config.toml is not there.")
    try:
        settings = _flat(tomllib.loads(read_text(config)))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{config}: it cannot be read as settings: {in_words(error)}. Copy a sound one back."
        ) from error
    metrics = folder / "metrics.jsonl"
    checkpoints, older = _checkpoints(folder / "checkpoints")
    return RunFiles(
        name=folder.resolve().name,
        settings=settings,
        metrics=read_metrics(metrics) if metrics.is_file() or parts_of(metrics) else [],
        summary=_json(folder / "summary.json"),
        curves=_json(folder / "curves.json"),
        checkpoints=checkpoints,
        people=_people(folder),
        stages=read_stages(folder),
        older=older,
    )


def _people(folder: Path) -> dict[str, Names]:
    files = [folder / NAMES, *sorted(folder.glob(f"*.{NAMES}"))]
    found = (path for path in files if path.is_file())
    return {path.name.removesuffix(NAMES).removesuffix("."): read_names(path) for path in found}


def _json(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: it cannot be read as JSON: {in_words(error)}. Copy a sound one back, or "
            "remove it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be an object, got {type(value).__name__}.")
    return value


def _flat(values: Json, prefix: str = "") -> Json:
    flat: Json = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _checkpoints(folder: Path) -> tuple[list[tuple[int, int]], int]:
    """Step and bytes of the newest, oldest first, and how many others there are."""
    words = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    steps = sorted((word for word in words if word.isdecimal()), key=int)
    sizes = [
        (
            int(word),
            sum(f.stat().st_size for f in (folder / f"step_{word}").iterdir() if f.is_file()),
        )
        for word in steps[-_CHECKPOINTS:]
    ]
    return sizes, len(steps) - len(sizes)
