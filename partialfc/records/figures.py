"""The picture of a training: loss and accuracy, scores of the pairs, ROC.

Drawn with matplotlib's objects and its Agg canvas: no window, no global state.

Shape suffixes: S = steps with a loss, V = verifications, N = pairs, U = points of the untrained
ROC.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MultipleLocator, PercentFormatter

from partialfc.protocols.verification import roc
from partialfc.writing import atomic_write

_INK = "#1f2933"
_FAINT = "#7b8794"
_GRID = "#e9ecef"
_BLUE = "#2563eb"
_GREEN = "#0d9373"
_CORAL = "#e0583b"

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 12.0, 4.1, 200

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
    untrained_scores: Numbers | None = None,
) -> None:
    """Write a PNG of 2400 x 820 pixels, the whole file or none.

    Three panels, or the first alone where there are no verification pairs.

    Args:
        path: Replaced if it exists.
        steps: Step of each loss, rising; [S], at least one.
        losses: Finite; [S].
        verification_steps: Step of each accuracy, rising; [V], may be empty.
        accuracies: In [0, 1]; [V].
        scores: Cosine of each verification pair; finite, [N]; or ``None``.
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds; or ``None``.
        title: Above the panels.
        untrained_scores: Cosines of the same pairs before training, for the ROC; [N].

    Raises:
        ValueError: If lengths differ, there is no loss, or a number is not finite.
        OSError: If the file cannot be written.
    """
    step_S, loss_S = _paired(steps, losses, "steps", "losses")
    step_V, accuracy_V = _paired(verification_steps, accuracies, "verification_steps", "accuracies")
    if not len(loss_S):
        raise ValueError("losses must hold at least one value; train for a step first.")
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.05)
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout=layout)
    if title:
        figure.suptitle(title, color=_INK, fontsize=14, fontweight="bold")
    if scores is None or same is None:
        _draw_training(figure.subplots(), step_S, loss_S, step_V, accuracy_V)
    else:
        training, histogram, curve = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
        _draw_training(training, step_S, loss_S, step_V, accuracy_V)
        _draw_scores(histogram, np.asarray(scores, dtype=np.float64), np.asarray(same))
        _draw_roc(curve, scores, same, untrained_scores)
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
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _draw_scores(axes: Axes, score_N: np.ndarray, same_N: np.ndarray) -> None:
    _frame(axes, "Verification pairs", "cosine")
    edges = np.linspace(min(score_N.min(), -0.2), max(score_N.max(), 0.8), 61).tolist()
    for chosen_N, colour, label in ((same_N, _GREEN, "same"), (~same_N, _CORAL, "different")):
        axes.hist(score_N[chosen_N], edges, color=colour, alpha=0.35, density=True)
        axes.hist(
            score_N[chosen_N],
            edges,
            color=colour,
            density=True,
            histtype="step",
            linewidth=1.5,
            label=label,
        )
    threshold = _best_threshold(score_N, same_N)
    axes.axvline(threshold, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.legend(frameon=False, fontsize=10)


def _draw_roc(
    axes: Axes, scores: Numbers, same: np.ndarray, untrained_scores: Numbers | None
) -> None:
    _frame(axes, "ROC", "false accept rate")
    far_V, tar_V, _ = roc(np.asarray(scores), same)
    axes.step(far_V, tar_V, where="post", color=_BLUE, linewidth=2, label="trained")
    if untrained_scores is not None:
        far_U, tar_U, _ = roc(np.asarray(untrained_scores), same)
        axes.step(far_U, tar_U, where="post", color=_FAINT, linewidth=1.5, label="at step 0")
        axes.legend(frameon=False, fontsize=10, loc="lower right")
    axes.set_xscale("log")
    axes.set_xlim(1 / int((~same).sum()), 1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("true accept rate", color=_INK, fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


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


def _best_threshold(score_N: np.ndarray, same_N: np.ndarray) -> float:
    """The middle of the first gap between scores that gives the best accuracy."""
    far_V, tar_V, threshold_V = roc(score_N, same_N)
    right_V = tar_V * same_N.sum() - far_V * (~same_N).sum()
    best = int(right_V[:-1].argmax())
    return float(min((threshold_V[best] + threshold_V[best + 1]) / 2, 1.0))
