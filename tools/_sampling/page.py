"""What sampling costs, of one or more records: cells of a table, and one HTML page."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from partialfc.records.pages import dot_chart, render
from partialfc.writing import write_text

Row = dict[str, Any]

COLUMNS = (
    *("rate", "negatives", "seeds", "rank 1", "against r = 1", "verification", "TAR@1e-3"),
    "CPU ms a step",
)


def write(path: Path, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Write the page, the whole file or none.

    Args:
        path: Replaced if it exists.
        records: What each is called, and one of ``tools/sampling.py``.
    """
    studies = [
        {
            "name": name,
            "settings": " ".join((record["config"], *record["words"])),
            "rows": cells(record["rows"]),
            "charts": [
                ("rank 1", _dots(record["rows"], _ranked, "{:.4g}")),
                ("against r = 1", _dots(record["rows"], _differences, "{:+.3g}")),
            ],
        }
        for name, record in records
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
                _spread(_ranked(found, rows)),
                _spread(_differences(found, rows), of_mean=True) if rate < 1 else "",
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


def _ranked(found: list[Row], rows: list[Row]) -> list[float]:
    return [row["rank_1"] for row in found]


def _differences(found: list[Row], rows: list[Row]) -> list[float]:
    """Rank 1 of each run below rate 1 against the one at rate 1 of its seed, where there is one."""
    whole = {row["seed"]: row["rank_1"] for row in rows if row["rate"] == 1}
    lower = [row for row in found if row["rate"] < 1 and row["seed"] in whole]
    return [row["rank_1"] - whole[row["seed"]] for row in lower]


def _dots(rows: list[Row], values: Callable[[list[Row], list[Row]], list[float]], form: str) -> str:
    """A dot for each run, in points, a line for each rate and kind that has any."""
    every = (
        (f"{rate:g}, {'all' if rate == 1 else negatives}", values(found, rows))
        for (rate, negatives), found in _by_kind(rows).items()
    )
    shown = [(name, [100 * value for value in found]) for name, found in every if found]
    return dot_chart(shown, label="points of rank 1", form=form.format)


def _spread(found: Sequence[float | None], *, of_mean: bool = False) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values) * 100:{'+' if of_mean else ''}.2f}"
    if len(values) < 2:
        return mean
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1)
    return f"{mean} ± {deviation * 100:.2f}"
