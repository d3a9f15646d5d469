"""What sampling costs, of one or more records: cells of a table, and one HTML page."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialfc.records.pages import dot_chart, render
from partialfc.writing import write_text

Row = dict[str, Any]

COLUMNS = (
    *("rate", "negatives", "seeds", "rank 1", "against r = 1", "verification", "TAR@1e-3"),
    "CPU ms a step",
)


def write(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page, the whole file or none.

    Args:
        path: Replaced if it exists.
        records: Of ``tools/sampling.py``, by what they are called.
    """
    studies = [
        {
            "name": name,
            "settings": " ".join((record["config"], *record["words"])),
            "rows": cells(record["rows"]),
            "charts": [
                ("rank 1", _dots(record["rows"])),
                ("against r = 1", _apart(record["rows"])),
            ],
        }
        for name, record in records.items()
    ]
    page = Path(__file__).with_name("sampling.html")
    write_text(path, render(page, title="Sampling", head=COLUMNS, studies=studies))


def cells(rows: list[Row]) -> list[tuple[str, ...]]:
    """Return a row of the table for each rate and kind of negatives.

    Numbers are means over seeds with their standard deviation, in points. "against r = 1" is the
    mean of the differences to the run at rate 1 of the same seed, with the standard error of that
    mean.
    """
    lines: list[tuple[str, ...]] = []
    for (rate, negatives), found in _by_kind(rows).items():
        lines.append(
            (
                f"{rate:g}",
                "all" if rate == 1 else negatives,
                str(len(found)),
                _spread([row["rank_1"] for row in found]),
                _spread([*_differences(found, rows)], of_mean=True) if rate < 1 else "",
                _spread([row["verification"] for row in found]),
                _spread([row["tar_at_far_1e-3"] for row in found]),
                f"{statistics.median(row['cpu_seconds_of_a_step'] for row in found) * 1e3:.1f}",
            )
        )
    return lines


def _by_kind(rows: list[Row]) -> dict[tuple[float, str], list[Row]]:
    """The runs of each rate and kind of negatives, the highest rate first."""
    every: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        every.setdefault((row["rate"], row["negatives"]), []).append(row)
    return dict(sorted(every.items(), key=lambda item: -item[0][0]))


def _differences(found: list[Row], rows: list[Row]) -> list[float]:
    """Rank 1 of each run against the one at rate 1 of its seed, where there is one."""
    whole = {row["seed"]: row["rank_1"] for row in rows if row["rate"] == 1}
    return [row["rank_1"] - whole[row["seed"]] for row in found if row["seed"] in whole]


def _name(rate: float, negatives: str) -> str:
    return "1, all" if rate == 1 else f"{rate:g}, {negatives}"


def _dots(rows: list[Row]) -> str:
    found = [
        (_name(*kind), [100 * row["rank_1"] for row in runs])
        for kind, runs in _by_kind(rows).items()
    ]
    return dot_chart(found, label="rank 1, %", form="{:.4g}".format)


def _apart(rows: list[Row]) -> str:
    found = [
        (_name(*kind), [100 * apart for apart in _differences(runs, rows)])
        for kind, runs in _by_kind(rows).items()
        if kind[0] < 1
    ]
    return dot_chart(found, label="points of rank 1 against rate 1", form="{:+.3g}".format)


def _spread(found: list[float | None], *, of_mean: bool = False) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values) * 100:{'+' if of_mean else ''}.2f}"
    if len(values) < 2:
        return mean
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1)
    return f"{mean} ± {deviation * 100:.2f}"
