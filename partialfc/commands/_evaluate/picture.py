"""The picture of an evaluation: ROC, DET, score histograms and CMC of all sets."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from partialfc.commands._evaluate.sets import Measured
from partialfc.protocols.curves import Curves
from partialfc.writing import atomic_write

INK, FAINT, GREEN, CORAL = "#1f2933", "#7b8794", "#0d9373", "#e0583b"
_MOST_HISTOGRAMS = 3


def draw(path: Path, found: dict[str, Measured], *, title: str) -> None:
    """Write the PNG, the whole file or none; panels are those that the sets have."""
    scored = {name: m.curves for name, m in found.items() if m.curves is not None}
    searched = {name: m.cmc for name, m in found.items() if m.cmc}
    panels = (["ROC", "DET"] if scored else []) + (["CMC"] if searched else [])
    panels += [f"scores of {name}" for name in list(scored)[:_MOST_HISTOGRAMS]]
    if not panels:
        return
    columns = min(2, len(panels))  # so that a phone shows the text at a readable size
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3.2 * rows + 0.3), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    for panel, name in zip(axes.flat, panels, strict=False):
        panel.set_title(name, loc="left", fontsize=11, color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e9ecef")
        panel.tick_params(labelsize=9, colors=FAINT)
        if name == "CMC":
            for label, rates in searched.items():
                panel.plot(range(1, len(rates) + 1), rates, label=label)
        elif name in ("ROC", "DET"):
            for label, one in scored.items():
                _line(panel, one, label, misses=name == "DET")
        else:
            shown = name.removeprefix("scores of ")
            _histogram(panel, scored[shown], found[shown].numbers.get("threshold"))
        panel.legend(frameon=False, fontsize=9)
    _scales(dict(zip(panels, axes.flat, strict=False)))
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)


def _scales(panels: dict[str, Axes]) -> None:
    if "ROC" in panels:
        false_accepts = "false accept rate (log scale)"
        panels["ROC"].set(xscale="log", xlabel=false_accepts, ylabel="true accept rate")
        panels["DET"].set(xscale="log", xlabel=false_accepts, ylabel="false reject rate")
        if any(np.size(line.get_xdata()) for line in panels["DET"].lines):  # else all are perfect
            panels["DET"].set(yscale="log", ylabel="false reject rate (log scale)")
    if "CMC" in panels:
        panels["CMC"].set(
            xscale="log", xlabel="rank k (log scale)", ylabel="found at rank k or better"
        )


def _line(panel: Axes, curves: Curves, label: str, *, misses: bool) -> None:
    far, tar = np.array(curves.far), np.array(curves.tar)
    if misses:
        inside = (far > 0) & (tar < 1)
        panel.plot(far[inside], 1 - tar[inside], label=label)
    else:
        panel.step(far, tar, where="post", label=label)


def _histogram(panel: Axes, curves: Curves, threshold: float | None) -> None:
    for label, colour, counts in (
        ("same", GREEN, curves.same),
        ("different", CORAL, curves.different),
    ):
        panel.stairs(counts, curves.edges, fill=True, color=colour, alpha=0.45, label=label)
    if threshold is not None:
        words = f"threshold {threshold:.2f}"
        panel.axvline(threshold, label=words, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    panel.set(xlabel="cosine", ylabel="share of pairs")
