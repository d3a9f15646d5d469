"""The report of a comparison: one HTML page without anything outside it."""

import base64
import html
import io
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools._compare.table import COLUMNS, Column, Result, cell, values

Found = dict[str, list[Result]]

INK, MUTED, BLUE, CORAL = "#1f2933", "#7b8794", "#2563eb", "#e0583b"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; margin: 2rem auto; max-width: 1200px;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.best { font-weight: 700; color: #0d7a5f; }
p.note { color: #52606d; }
"""
_MARK = ' class="best"'
_SMALL_IS_BEST = ("angle to own", "peak GiB")
_NOT_COMPARED = ("loss", "to nearest other", "images/s")


def write(path: Path, found: Found, *, title: str) -> None:
    """Write the page, the whole file or none."""
    done = {label: results for label, results in found.items() if results}
    seeds = sorted({result["seed"] for results in done.values() for result in results})
    pictures = [
        ("Accuracy on held-out identities", _accuracies(done)),
        ("Loss", _losses(done)),
        ("Angles of training images to class centers", _angles(done)),
    ]
    body = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="{_uri(figure)}">'
        for name, figure in pictures
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="note">Seeds {", ".join(map(str, seeds))}; a seed decides the order of the data '
        "for all settings. Mean over seeds ± half the distance from smallest to largest; the best "
        "mean of a column is green. IR@FPIR: rank-1 identification rate at a false-positive "
        "identification rate, half of the identities of the same set being distractors. Losses of "
        "different margins are not comparable.</p>"
        f'<div class="scroll">{_table(done)}</div>{body}</body></html>'
    )
    partial.replace(path)


def _table(found: Found) -> str:
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in COLUMNS)
    best = {column.title: _best(column, found) for column in COLUMNS}
    rows = []
    for label, results in found.items():
        cells = "".join(
            f"<td{_MARK if best[column.title] == label else ''}>{cell(column, results)}</td>"
            for column in COLUMNS
        )
        rows.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _best(column: Column, found: Found) -> str | None:
    if column.title in _NOT_COMPARED or len(found) < 2:
        return None
    means = {
        label: statistics.mean(numbers)
        for label, results in found.items()
        if (numbers := values(column, results))
    }
    sign = -1 if column.title in _SMALL_IS_BEST else 1
    return max(means, key=lambda label: sign * means[label]) if means else None


def _accuracies(found: Found) -> Figure:
    """A dot for every run, a bar for the mean: one panel for each number."""
    shown = ("verification", "TAR@FAR 1e-3", "rank 1", "IR@FPIR 0.1")
    columns = [c for c in COLUMNS if c.title in shown and any(values(c, r) for r in found.values())]
    height = 1.2 + 0.28 * len(found)
    figure, axes = pyplot.subplots(
        1,
        max(1, len(columns)),
        figsize=(12, height),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    labels = list(found)
    for panel, column in zip(axes[0], columns, strict=False):
        for y, label in enumerate(labels):
            numbers = values(column, found[label])
            panel.plot(numbers, [y] * len(numbers), "o", color=BLUE, alpha=0.45, markersize=5)
            if numbers:
                panel.plot([statistics.mean(numbers)], [y], "|", color=INK, markersize=14)
        panel.set_title(column.title, fontsize=10, loc="left", color=INK)
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        _plain(panel)
    return figure


def _losses(found: Found) -> Figure:
    figure, panel = pyplot.subplots(figsize=(12, 3.6), layout="constrained")
    colours = pyplot.get_cmap("turbo")(np.linspace(0.05, 0.95, max(1, len(found))))
    for colour, (label, results) in zip(colours, found.items(), strict=True):
        for number, result in enumerate(results):
            steps, losses = np.array(result["losses"]).T
            smooth = _smoothed(losses)
            name = label if number == 0 else None
            panel.plot(steps, smooth, color=colour, linewidth=1, alpha=0.8, label=name)
    panel.set(xlabel="step", ylabel="loss", yscale="log")
    panel.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _plain(panel)
    return figure


def _angles(found: Found) -> Figure:
    columns = min(4, len(found))
    rows = -(-len(found) // max(1, columns))
    figure, axes = pyplot.subplots(
        max(1, rows),
        max(1, columns),
        figsize=(12, 1.9 * max(1, rows) + 0.4),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    for panel, (label, results) in zip(axes.flat, found.items(), strict=False):
        for name, colour in (("own", BLUE), ("other", CORAL)):
            counts = np.mean([result[f"{name}_histogram"] for result in results], axis=0)
            edges = np.linspace(0, 180, len(counts) + 1)
            panel.stairs(counts / counts.sum(), edges, fill=True, color=colour, alpha=0.55)
        panel.set_title(label, fontsize=9, loc="left")
        panel.set_xticks(range(0, 181, 45))
        panel.set_yticks([])
        _plain(panel)
    figure.supxlabel("degrees; blue: to the own center, red: to the nearest other", fontsize=9)
    return figure


def _smoothed(losses: np.ndarray) -> np.ndarray:
    width = max(1, len(losses) // 50)
    padded = np.pad(losses, (width // 2, width - 1 - width // 2), mode="edge")
    smooth: np.ndarray = np.convolve(padded, np.ones(width) / width, mode="valid")
    return smooth


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8, colors=MUTED)


def _uri(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
