"""A picture of tools/bench/head.py's records: time and memory of a step against the identities."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = tuple[str, float, int, int, int, str]
"""Head, sample rate, D, B, ranks, precision: what is the same along a line."""


def plot(records: list[dict[str, Any]], out: str | Path) -> None:
    """Draw seconds a step and extra peak memory against C, one line for what else is the same.

    Of a point in several records the last one counts.
    """
    curves = _curves(records)
    # One above the other, so that a phone shows the text at a readable size.
    figure, (time, memory) = pyplot.subplots(2, 1, figsize=(7.2, 9.2), layout="constrained")
    rates = sorted({curve[1] for curve in curves}, reverse=True)
    colours = dict(zip(rates, pyplot.get_cmap("viridis")([0.1, 0.45, 0.7, 0.9]), strict=False))
    worlds = sorted({curve[4] for curve in curves})
    markers = dict(zip(worlds, "os^Dvx", strict=False))
    dims = sorted({curve[2] for curve in curves}, reverse=True)
    fills = dict(zip(dims, ("full", "left", "top", "bottom"), strict=False))
    told = [index for index in range(1, 6) if len({curve[index] for curve in curves}) > 1]
    for curve, points in sorted(curves.items()):
        classes = sorted(points)
        seconds, bytes_ = zip(*(points[count] for count in classes), strict=True)
        said = ("", "r = {}", "D = {}", "B = {}", "W = {}", "{}")
        values = [said[index].format(curve[index]) for index in told]
        label = ", ".join(["partialfc" if curve[0] == "ours" else curve[0], *values])
        style = {"color": colours[curve[1]], "marker": markers[curve[4]], "label": label}
        dashes = "-" if curve[2] == dims[0] else ":"
        ours = {"linestyle": dashes, "fillstyle": fills[curve[2]], "markersize": 8}
        ours |= {"markerfacecoloralt": "white"}
        style |= ours if curve[0] == "ours" else {"linestyle": "--", "markerfacecolor": "none"}
        time.plot(classes, seconds, **style)
        memory.plot(classes, [value / 2**20 for value in bytes_], **style)
    for axes, title in ((time, "seconds a step"), (memory, "MiB beyond centers and states")):
        axes.set(xscale="log", yscale="log", xlabel="identities (log scale)")
        axes.set_title(f"{title} (log scale)", loc="left", fontsize=12)
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=10, ncols=2, loc="outside lower left", frameon=False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _curves(records: list[dict[str, Any]]) -> dict[Curve, dict[int, tuple[float, float]]]:
    curves: dict[Curve, dict[int, tuple[float, float]]] = defaultdict(dict)
    for row in (row for record in records for row in record["rows"]):
        for name, head in row["heads"].items():
            if "extra_peak_bytes" not in head:  # out of memory, say
                continue
            point = head["step_seconds"]["median"], head["extra_peak_bytes"]
            same = (row["rate"], row["dim"], row["batch"], row["world"], row["dtype"])
            curves[(name, *same)][row["classes"]] = point
    return curves
