"""Charts as SVG text that follows the page: its colours, its fonts, its width.

A chart is 400 units wide, about its width on a phone and in a column of a desktop page, so that its
text has the size of the page's.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_POINTS = 300
_TICKS = 4


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its points and the number of its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    form: Callable[[float], str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    filled: bool = False,
) -> str:
    """Return an SVG of lines, or "" where no point can be drawn.

    Args:
        series: Points that are not finite, or not positive on a logarithmic axis, are left out.
        x_label: Below the chart.
        form: Of the numbers on the vertical axis.
        log_x: Logarithmic horizontal axis.
        log_y: Logarithmic vertical axis.
        filled: Fill the area below the lines.
    """
    every = [(one, _points(one, log_x, log_y)) for one in series]
    drawn = [(one, x, y) for one, (x, y) in every if len(x)]
    if not drawn:
        return ""
    low_x, high_x = _range([x for _, x, _ in drawn])
    low_y, high_y = _range([y for _, _, y in drawn])
    if not log_y and 0 <= low_y < 0.5 * high_y:
        low_y = 0.0
    high_y += 0.04 * (high_y - low_y)

    def place_x(values: np.ndarray) -> np.ndarray:
        return _LEFT + (values - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)

    def place_y(values: np.ndarray) -> np.ndarray:
        return HEIGHT - _BOTTOM - (values - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(x_label)}">']
    write = form or _short
    for value in _ticks(low_y, high_y, log_y):
        y = float(place_y(np.array(value)))
        label = write(10**value if log_y else value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{html.escape(label)}</text>'
        )
    for value in _ticks(low_x, high_x, log_x):
        x = float(place_x(np.array(value)))
        label = _short(10**value if log_x else value)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">'
        f"{html.escape(x_label)}</text>"
    )
    for one, x_P, y_P in drawn:
        across, up = place_x(x_P), place_y(y_P)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
        if filled:
            base = HEIGHT - _BOTTOM
            edge = f"{across[0]:.1f},{base} {points} {across[-1]:.1f},{base}"
            parts.append(f'<polygon class="area c{one.colour}" points="{edge}"/>')
        if len(across) == 1:
            a, b = points.split(",")
            parts.append(f'<circle class="c{one.colour}" cx="{a}" cy="{b}" r="4"/>')
        parts.append(f'<polyline class="line c{one.colour}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Return the names beside the colours 0, 1, ..."""
    items = "".join(
        f'<span><i class="c{number}"></i>{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'


def steps_of(edges: Sequence[float], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the outline of a histogram as points."""
    x = [edge for edge in edges for _ in (0, 1)][1:-1]
    return x, [count for count in counts for _ in (0, 1)]


def _points(one: Series, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """What can be drawn, as means of neighbours where there are too many."""
    x, y = np.asarray(one.x, dtype=np.float64), np.asarray(one.y, dtype=np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    keep &= (x > 0) | (not log_x)
    keep &= (y > 0) | (not log_y)
    x, y = x[keep], y[keep]
    x, y = np.log10(x) if log_x else x, np.log10(y) if log_y else y
    if len(x) > _POINTS and not log_x:
        start = np.linspace(0, len(x), _POINTS, endpoint=False).astype(np.int64)
        count = np.diff(np.append(start, len(x)))
        x, y = np.add.reduceat(x, start) / count, np.add.reduceat(y, start) / count
    return x, y


def _range(values: list[np.ndarray]) -> tuple[float, float]:
    low = min(float(part.min()) for part in values)
    high = max(float(part.max()) for part in values)
    spread = max(high - low, 1e-12, 1e-6 * abs(high))
    return (low, high) if high - low >= spread else (low - spread / 2, high + spread / 2)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log and high - low >= 1:
        every = math.ceil((high - low) / (_TICKS + 2))
        return [float(v) for v in range(math.ceil(low), math.floor(high) + 1, every)]
    step = 10 ** math.floor(math.log10((high - low) / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= _TICKS + 1)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"
