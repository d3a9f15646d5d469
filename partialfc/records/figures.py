"""The picture of a training: loss and accuracy, scores of the pairs, ROC.

Drawn with matplotlib's objects and its Agg canvas: no window, no global state.

Shape suffixes: S = steps with a loss, V = verifications, N = pairs, U = vertices of a ROC.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from partialfc.protocols.verification import best_threshold, roc
from partialfc.writing import atomic_write

_INK = "#1f2933"
_FAINT = "#7b8794"
_GRID = "#e9ecef"
_BLUE = "#2563eb"
_GREEN = "#0d9373"
_CORAL = "#e0583b"

_WIDTH_INCHES, _TALL_INCHES, _FLAT_INCHES, _DOTS_PER_INCH = 7.2, 6.4, 3.4, 200
"""With three panels and with one: narrow, so that a phone shows its text at a readable size."""

_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")
_EVEN = (1, 2, 2.5, 5, 10)
"""Steps between ticks whose labels are not rounded."""

Numbers = Sequence[float] | np.ndarray


def training_figure(
    path: str | Path,
    steps: Numbers,
    losses: Numbers,
    verification_steps: Numbers,
    accuracies: Numbers,
    scores: Numbers | None = None,
    same: np.ndarray | None = None,
    title: str = "",
    untrained: tuple[Numbers, Numbers] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """Write a PNG of 1440 x 1280 pixels, the whole file or none.

    Three panels, or the first alone, 1440 x 680, where there are no verification pairs.

    Args:
        path: Replaced if it exists.
        steps: Step of each loss, rising; [S], at least one.
        losses: Finite; [S].
        verification_steps: Step of each accuracy, rising; [V], may be empty.
        accuracies: In [0, 1]; [V].
        scores: Cosine of each verification pair; finite, [N]; or ``None``.
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds; or ``None``.
        title: Above the panels.
        untrained: FAR and TAR of the same pairs before training, both rising, in [0, 1]; [U].
        marks: Steps at which a dashed line stands upright, and its name: where a stage begins.

    Raises:
        ValueError: If lengths differ, there is no loss, or a number is not finite.
        OSError: If the file cannot be written.
    """
    step_S, loss_S = _paired(steps, losses, "steps", "losses")
    step_V, accuracy_V = _paired(verification_steps, accuracies, "verification_steps", "accuracies")
    if not len(loss_S):
        raise ValueError("losses must hold at least one value; train for a step first.")
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)
    height = _FLAT_INCHES if scores is None or same is None else _TALL_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout=layout)
    if title:
        figure.suptitle(title, color=_INK, fontsize=14, fontweight="bold")
    panels: dict[str, Axes] = {}
    if scores is None or same is None:
        training = figure.subplots()
    else:
        panels = figure.subplot_mosaic([["training", "training"], ["scores", "roc"]])
        training = panels["training"]
    _draw_training(training, step_S, loss_S, step_V, accuracy_V)
    for step, name in marks:
        training.axvline(step, color=_FAINT, linestyle=(0, (3, 4)), linewidth=1)
        training.annotate(
            name,
            (step, 1),
            (4, -4),
            xycoords=training.get_xaxis_transform(),
            textcoords="offset points",
            verticalalignment="top",
            color=_FAINT,
            fontsize=9,
        )
    if scores is not None and same is not None:
        _draw_scores(panels["scores"], np.asarray(scores, dtype=np.float64), np.asarray(same))
        _draw_roc(panels["roc"], scores, same, untrained)
    _save(figure, Path(path))


def _paired(
    abscissa: Numbers, ordinate: Numbers, name: str, other: str
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(abscissa, dtype=np.float64), np.asarray(ordinate, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"{other} must be one per {name}, got {y.shape} for {x.shape}.")
    for values, label in ((x, name), (y, other)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{label}[{bad[0]}] is {values[bad[0]]}; leave it out of the figure.")
    return x, y


def _draw_training(
    axes: Axes,
    step_S: np.ndarray,
    loss_S: np.ndarray,
    step_V: np.ndarray,
    accuracy_V: np.ndarray,
) -> None:
    _frame(axes, "Training", "step")
    axes.plot(step_S, loss_S, color=_BLUE, alpha=0.22, linewidth=0.7)
    axes.plot(step_S, _smooth(loss_S), color=_BLUE, linewidth=2)
    axes.set_ylabel("loss", color=_BLUE, fontsize=11)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, step_S[-1])
    if len(step_V):
        right = axes.twinx()
        _frame(right, "", "")
        right.grid(visible=False)
        right.plot(
            step_V, accuracy_V, color=_GREEN, linewidth=2, marker="o", markersize=4, clip_on=False
        )
        right.set_ylabel("verification accuracy", color=_GREEN, fontsize=11)
        right.yaxis.set_major_locator(MaxNLocator(5, steps=_EVEN))
        right.yaxis.set_major_formatter(_PERCENT)


def _draw_scores(axes: Axes, score_N: np.ndarray, same_N: np.ndarray) -> None:
    _frame(axes, "Verification pairs", "cosine")
    edges = np.linspace(min(score_N.min(), -0.2), max(score_N.max(), 0.8), 61).tolist()
    for chosen_N, colour, label in ((same_N, _GREEN, "same"), (~same_N, _CORAL, "different")):
        share_N = np.full(int(chosen_N.sum()), 1 / chosen_N.sum())
        axes.hist(
            score_N[chosen_N],
            edges,
            weights=share_N,
            histtype="stepfilled",
            label=label,
            edgecolor=colour,
            facecolor=(colour, 0.35),
            linewidth=1.3,
        )
    threshold = best_threshold(score_N, same_N)
    words = f"threshold {threshold:.2f}"
    axes.axvline(threshold, label=words, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_ylabel("share of pairs", color=_INK, fontsize=11)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_EVEN))
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_EVEN))
    _legend(axes)


def _draw_roc(
    axes: Axes, scores: Numbers, same: np.ndarray, untrained: tuple[Numbers, Numbers] | None
) -> None:
    _frame(axes, "ROC", "false accept rate (log scale)")
    far_U, tar_U, _ = roc(np.asarray(scores), same)
    axes.step(far_U, tar_U, where="post", color=_BLUE, linewidth=2, label="trained")
    if untrained is not None:
        axes.step(*untrained, where="post", color=_FAINT, linewidth=1.5, label="at step 0")
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1 / int((~same).sum()), 1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("true accept rate", color=_INK, fontsize=11)
    axes.yaxis.set_major_formatter(_PERCENT)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Beside what is drawn, between it and the title: inside it would hide some of it."""
    legend = axes.legend(
        frameon=False,
        fontsize=9,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.0,
    )
    legend.set_in_layout(False)  # else the panel is made as narrow as its legend asks for
    axes.set_title(axes.get_title(loc="left"), loc="left", color=_INK, fontsize=12, pad=24)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH, facecolor="white")


def _frame(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=12, pad=8)
    axes.set_xlabel(x_label, color=_INK, fontsize=11)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=10, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _smooth(value_S: np.ndarray) -> np.ndarray:
    """Mean over a centred window of one fiftieth of the run, cut off at the ends."""
    half = max(1, len(value_S) // 100)
    total = np.concatenate([[0.0], np.cumsum(value_S)])
    index = np.arange(len(value_S))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(value_S))
    return np.asarray((total[end] - total[start]) / (end - start))
