"""Charts as SVG text that follows the page: its colours, its fonts, its width.

A chart is 400 units wide, about its width on a phone and in a column of a desktop page, so that its
text has the size of the page's.

Shape suffixes: P = points of a line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_POINTS = 300
_TICKS = 4
_ROW = 30
_COLOURS = 8

Form = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its points and the number of its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


def colour(number: int) -> str:
    """Return the classes of a colour: eight, then the same ones dashed, then dotted."""
    dash = f" d{number // _COLOURS % 3}" if number >= _COLOURS else ""
    return f"c{number % _COLOURS}{dash}"


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    form: Form | None = None,
    log_x: bool = False,
    log_y: bool = False,
    filled: bool = False,
    scale: Sequence[Series] = (),
    marks: Sequence[float] = (),
) -> Markup:
    """Return an SVG of lines, or "" where no point can be drawn.

    Of many points each of 300 stretches shows its mean; a single line has the range of each
    stretch as a band.

    Args:
        series: Points that are not finite, or not positive on a logarithmic axis, are left out.
        x_label: Below the chart.
        form: Of the numbers on the vertical axis.
        log_x: Logarithmic horizontal axis; said behind its label.
        log_y: Logarithmic vertical axis; said below it.
        filled: Fill the area below the lines.
        scale: Lines that the axes have room for too, so that charts are on one scale.
        marks: Where a dashed line stands upright, on a linear horizontal axis.
    """
    every = [(one, _points(one, log_x, log_y)) for one in series]
    drawn = [(one, points) for one, points in every if points.size]
    if not drawn:
        return Markup("")
    banded = len(drawn) == 1
    others = [points for one in scale if (points := _points(one, log_x, log_y)).size]
    fitted = [*(points for _, points in drawn), *others]
    across = _Axis.over([points[0] for points in fitted], _LEFT, WIDTH - _RIGHT, log_x)
    shown = [points[1:] if banded else points[1] for points in fitted]
    up = _Axis.over(shown, HEIGHT - _BOTTOM, _TOP, log_y, roomy=True)
    parts = [*_rows(up, form or _short), *_columns(across, _short, HEIGHT - _BOTTOM + 15)]
    inside = [x for x in marks if across.low < x < across.high]
    parts += [_upright(float(across.at(np.array(x)))) for x in inside]
    parts.append(_text(WIDTH - _RIGHT, HEIGHT - 4, x_label + " (log scale)" * log_x, "end"))
    if log_y:
        parts.append(_text(0, HEIGHT - 4, "↑ log scale", "start"))
    for one, points in drawn:
        x_P, (y_P, low_P, high_P), css = across.at(points[0]), up.at(points[1:]), colour(one.colour)
        line = _pairs(x_P, y_P)
        if banded and (low_P != high_P).any():
            edge = _pairs(np.append(x_P, x_P[::-1]), np.append(low_P, high_P[::-1]))
            parts.append(f'<polygon class="area {css}" points="{edge}"/>')
        if filled:
            base = HEIGHT - _BOTTOM
            edge = f"{x_P[0]:.1f},{base} {line} {x_P[-1]:.1f},{base}"
            parts.append(f'<polygon class="area {css}" points="{edge}"/>')
        if len(x_P) == 1:
            parts.append(_dot(x_P[0], y_P[0], css))
        parts.append(f'<polyline class="line {css}" points="{line}"/>')
    return _svg(parts, HEIGHT, x_label)


def dot_chart(rows: Sequence[tuple[str, Sequence[float]]], *, label: str, form: Form) -> Markup:
    """Return an SVG with a dot for each number of a name and a bar at their mean.

    It is "" where there is no number.

    Args:
        rows: Names, and their finite numbers; a name may have none.
        label: What the numbers are, for who cannot see the chart.
        form: Of the numbers on the axis.
    """
    numbers = [np.asarray(values, dtype=np.float64) for _, values in rows if len(values)]
    if not numbers:
        return Markup("")
    bottom = _ROW * len(rows) + 4
    across = _Axis.over(numbers, 10, WIDTH - 24, log=False)
    parts = _columns(across, form, bottom + 14)
    for number, (name, values) in enumerate(rows):
        y = _ROW * (number + 1) - 6
        parts += [_text(0, y - 9, name, "start"), _level(0, y)]
        parts += [_dot(x, y, "dot c0") for x in across.at(np.asarray(values, dtype=np.float64))]
        if len(values):
            mean = float(across.at(np.array(fmean(values))))
            parts.append(
                f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 6}" y2="{y + 6}"/>'
            )
    return _svg(parts, bottom + 20, label)


def steps_of(edges: Sequence[float], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the outline of a histogram as points."""
    x = [edge for edge in edges for _ in (0, 1)][1:-1]
    return x, [count for count in counts for _ in (0, 1)]


@dataclass(frozen=True, slots=True)
class _Axis:
    """From numbers, or their logarithms, to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(
        cls, parts: list[np.ndarray], start: float, end: float, log: bool, *, roomy: bool = False
    ) -> "_Axis":
        """An axis that all values fit on; ``roomy`` with 0 if it is near, and space at the end."""
        low = min(float(part.min()) for part in parts)
        high = max(float(part.max()) for part in parts)
        spread = max(high - low, 1e-12, 1e-6 * abs(high))
        if high - low < spread:
            low, high = low - spread / 2, high + spread / 2
        if roomy:
            low = 0.0 if not log and 0 <= low < 0.5 * high else low
            high += 0.04 * (high - low)
        return cls(low, high, start, end, log)

    def at(self, values: np.ndarray) -> np.ndarray:
        share: np.ndarray = (values - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, form: Form) -> list[tuple[float, str]]:
        """Places, and what is written there."""
        found = _ticks(self.low, self.high, self.log)
        return [
            (float(self.at(np.array(value))), form(10**value if self.log else value))
            for value in found
        ]


def _points(one: Series, log_x: bool, log_y: bool) -> np.ndarray:
    """What is drawn of a line, [4, P]: x, y and y's range; logarithms on a logarithmic axis."""
    x_P, y_P = np.asarray(one.x, dtype=np.float64), np.asarray(one.y, dtype=np.float64)
    keep_P = np.isfinite(x_P) & np.isfinite(y_P)
    keep_P &= (x_P > 0) | (not log_x)
    keep_P &= (y_P > 0) | (not log_y)
    x_P, y_P = x_P[keep_P], y_P[keep_P]
    x_P, y_P = np.log10(x_P) if log_x else x_P, np.log10(y_P) if log_y else y_P
    if len(x_P) <= _POINTS or log_x:
        return np.stack([x_P, y_P, y_P, y_P])
    start = np.linspace(0, len(x_P), _POINTS, endpoint=False).astype(np.int64)
    count = np.diff(np.append(start, len(x_P)))
    means = [np.add.reduceat(values, start) / count for values in (x_P, y_P)]
    return np.stack([*means, np.minimum.reduceat(y_P, start), np.maximum.reduceat(y_P, start)])


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log and high - low >= 2.5:
        every = math.ceil((high - low) / (_TICKS + 2))
        return [float(v) for v in range(math.ceil(low), math.floor(high) + 1, every)]
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        marks = [decade + math.log10(factor) for decade in decades for factor in (1, 2, 5)]
        shown = [mark for mark in marks if low <= mark <= high]
        linear = _ticks(10**low, 10**high, log=False)
        return shown if len(shown) > 2 else [math.log10(value) for value in linear]
    step = 10 ** math.floor(math.log10((high - low) / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= _TICKS + 1)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _rows(axis: _Axis, form: Form) -> list[str]:
    return [
        _level(_LEFT, y) + _text(_LEFT - 6, y + 4, words, "end") for y, words in axis.ticks(form)
    ]


def _columns(axis: _Axis, form: Form, y: float) -> list[str]:
    return [_text(x, y, words, "middle") for x, words in axis.ticks(form)]


def _level(left: float, y: float) -> str:
    return f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _upright(x: float) -> str:
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _dot(x: float, y: float, css: str) -> str:
    return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _pairs(x_P: np.ndarray, y_P: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(x_P, y_P, strict=True))


def _svg(parts: list[str], height: float, label: str) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return Markup("".join([head, *parts, "</svg>"]))


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"
