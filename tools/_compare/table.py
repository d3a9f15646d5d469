"""The numbers of a comparison: what they are called, and how means and spreads are written."""

import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.writing import atomic_write

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a run.

    Attributes:
        title: Of the column.
        value: From a result; ``None`` where the run has no such number.
        form: Format of the number.
    """

    title: str
    value: Callable[[Result], float | None]
    form: str = ".4f"


def _of(*path: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found: Any = result
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return None if found is None or found != found else float(found)

    return value


COLUMNS = (
    Column("training accuracy", _of("training_accuracy")),
    Column("verification", _of("verification", "accuracy")),
    Column("TAR@FAR 1e-2", _of("verification", "tar_at_far", "0.01")),
    Column("TAR@FAR 1e-3", _of("verification", "tar_at_far", "0.001")),
    Column("rank 1", _of("identification", "rank_1")),
    Column("IR@FPIR 0.1", _of("open_set", "rate_at_fpir", "0.1")),
    Column("IR@FPIR 0.01", _of("open_set", "rate_at_fpir", "0.01")),
    Column("angle to own", _of("own_angle"), ".1f"),
    Column("to nearest other", _of("other_angle"), ".1f"),
    Column("loss", _of("loss"), ".3f"),
    Column("images/s", _of("images_per_second"), ",.0f"),
    Column("peak GiB", lambda result: result["peak_memory_bytes"] / 2**30, ".2f"),
)


def values(column: Column, results: list[Result]) -> list[float]:
    """Return the numbers of all seeds that have it."""
    return [value for result in results if (value := column.value(result)) is not None]


def cell(column: Column, results: list[Result]) -> str:
    """Return the mean over seeds, and half the spread from smallest to largest behind it."""
    found = values(column, results)
    if not found:
        return "–"
    mean = f"{statistics.mean(found):{column.form}}"
    if len(found) == 1:
        return mean
    return f"{mean} ± {(max(found) - min(found)) / 2:{column.form}}"


def write_csv(path: Path, found: dict[str, list[Result]]) -> None:
    """Write a line for every run."""
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "seed", *(column.title for column in COLUMNS)])
        for label, results in found.items():
            for result in results:
                numbers = (column.value(result) for column in COLUMNS)
                shown = ("" if number is None else f"{number:.6g}" for number in numbers)
                writer.writerow([label, result["seed"], *shown])
