"""A picture of tools/bench/head.py's records: time and memory of a step against the identities."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Curves = dict[tuple[str, float], list[tuple[int, float, float]]]


def plot(records: list[dict[str, Any]], out: str | Path) -> None:
    """Draw seconds a step and extra peak memory against C, one line per head and sample rate."""
    curves = _curves(records)
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    rates = sorted({rate for _, rate in curves}, reverse=True)
    colours = dict(zip(rates, pyplot.get_cmap("viridis")([0.15, 0.5, 0.8, 0.95]), strict=False))
    for (head, rate), points in sorted(curves.items(), key=lambda item: (item[0][0], -item[0][1])):
        classes, seconds, bytes_ = zip(*sorted(points), strict=True)
        label = f"{'partialfc' if head == 'ours' else head}, r = {rate:g}"
        style = {"color": colours[rate], "marker": "o", "label": label}
        style["linestyle"] = "-" if head == "ours" else "--"
        time.plot(classes, seconds, **style)
        memory.plot(classes, [value / 2**20 for value in bytes_], **style)
    for axes, title in ((time, "seconds a step"), (memory, "MiB beyond centers and states")):
        axes.set(xscale="log", yscale="log", xlabel="identities", title=title)
        axes.grid(which="both", alpha=0.25)
    time.legend(fontsize=8)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _curves(records: list[dict[str, Any]]) -> Curves:
    curves: Curves = defaultdict(list)
    for row in (row for record in records for row in record["rows"]):
        for name, head in row["heads"].items():
            point = row["classes"], head["step_seconds"]["median"], head["extra_peak_bytes"]
            curves[name, row["rate"]].append(point)
    return curves
