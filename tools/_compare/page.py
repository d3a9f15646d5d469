"""The report of a comparison: one HTML page without anything outside it."""

import statistics
from pathlib import Path

import numpy as np

from partialfc.records.pages import Series, dot_chart, line_chart, render, steps_of
from partialfc.writing import write_text
from tools._compare.table import COLUMNS, Column, Result, cell, values

Found = dict[str, list[Result]]

_SMALL_IS_BEST = ("angle to own", "peak GiB")
_NOT_COMPARED = ("loss", "to nearest other", "images/s")
_DRAWN = ("verification", "TAR@FAR 1e-3", "rank 1", "IR@FPIR 0.1")


def write(path: Path, found: Found, *, title: str) -> None:
    """Write the page, the whole file or none."""
    done = {label: results for label, results in found.items() if results}
    seeds = sorted({result["seed"] for results in done.values() for result in results})
    page = render(
        Path(__file__).with_name("compare.html"),
        title=title,
        seeds=", ".join(map(str, seeds)),
        names=list(done),
        head=["", *(column.title for column in COLUMNS)],
        rows=[
            [label, *(cell(column, results) for column in COLUMNS)]
            for label, results in done.items()
        ],
        best={(_best(column, done), number + 1) for number, column in enumerate(COLUMNS)},
        accuracies=[(c.title, _dots(c, done)) for c in COLUMNS if c.title in _DRAWN],
        losses=_losses(done),
        angles=_angles(done),
    )
    write_text(path, page)


def _best(column: Column, found: Found) -> int | None:
    """The row with the best mean."""
    if column.title in _NOT_COMPARED or len(found) < 2:
        return None
    means = {
        row: statistics.mean(numbers)
        for row, results in enumerate(found.values())
        if (numbers := values(column, results))
    }
    sign = -1 if column.title in _SMALL_IS_BEST else 1
    return max(means, key=lambda row: sign * means[row]) if means else None


def _dots(column: Column, found: Found) -> str:
    rows = [(label, values(column, results)) for label, results in found.items()]
    return dot_chart(rows, label=column.title, form="{:.4g}".format)


def _losses(found: Found) -> str:
    series = []
    for number, (label, results) in enumerate(found.items()):
        for result in results:
            steps, losses = np.array(result["losses"]).T
            series.append(Series(label, steps.tolist(), _smoothed(losses), number))
    return line_chart(series, x_label="step", log_y=True)


def _angles(found: Found) -> list[tuple[str, str, list[tuple[int, str]]]]:
    """A histogram of every setting, all on one scale, with its key."""
    every = {label: _histograms(results) for label, results in found.items()}
    scale = [one for series in every.values() for one in series]
    return [
        (
            label,
            line_chart(series, x_label="degrees", form=_percent, filled=True, scale=scale),
            [(one.colour, one.name) for one in series],
        )
        for label, series in every.items()
    ]


def _histograms(results: list[Result]) -> list[Series]:
    series = []
    for name, words, colour in (("own", "own center", 0), ("other", "nearest other", 1)):
        counts = np.mean([result[f"{name}_histogram"] for result in results], axis=0)
        edges = np.linspace(0, 180, len(counts) + 1).tolist()
        series.append(Series(words, *steps_of(edges, counts / counts.sum()), colour))
    return series


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _smoothed(losses: np.ndarray) -> list[float]:
    width = max(1, len(losses) // 50)
    padded = np.pad(losses, (width // 2, width - 1 - width // 2), mode="edge")
    smooth: list[float] = np.convolve(padded, np.ones(width) / width, mode="valid").tolist()
    return smooth
