"""Lines as SVG, small enough to be a part of a page."""

import math
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 400, 170, 54, 22, 8
_POINTS = 400

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, *, log: bool = False, percent: bool = False) -> str:
    """Return an SVG of a line over the steps of a run; "" without two points.

    Many points become the mean of each of 400 stretches, with the range of each as a band.

    Args:
        points: (step, value), by step.
        log: Logarithmic values, where all are positive.
        percent: Values are shares.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    log = log and min(y for _, y in points) > 0
    low_x, high_x = points[0][0], points[-1][0]
    stretches = _stretches(points)
    values = [y for stretch in stretches for y in stretch[1:]]
    low, high = _range(min(values), max(values), log)
    low = max(low, 0.0) if not log and min(values) >= 0 else low
    high = min(high, 1.0) if percent else high

    def place(x: float, y: float) -> str:
        share = (x - low_x) / (high_x - low_x)
        value = math.log10(y) if log else y
        up = (value - low) / (high - low)
        left = _LEFT + share * (_WIDTH - _LEFT - 8)
        return f"{left:.1f},{_HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in range(5):
        value = low + (high - low) * tick / 4
        shown = 10**value if log else value
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * tick / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y}" y2="{y}"/>')
        text = f"{shown:.1%}" if percent else _short(shown)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        at = _LEFT if anchor == "start" else _WIDTH - 8
        parts.append(
            f'<text x="{at}" y="{_HEIGHT - 5}" text-anchor="{anchor}">step {x:,.0f}</text>'
        )
    if len(points) > len(stretches):
        above = [place(x, most) for x, _, _, most in stretches]
        below = [place(x, least) for x, _, least, _ in reversed(stretches)]
        parts.append(f'<polygon class="band" points="{" ".join(above + below)}"/>')
    line = " ".join(place(x, mean) for x, mean, _, _ in stretches)
    parts.append(f'<polyline class="line" points="{line}"/></svg>')
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


def _stretches(points: Points) -> list[tuple[float, float, float, float]]:
    """(last step, mean, least, most) of each stretch of the points."""
    length = max(1, math.ceil(len(points) / _POINTS))
    found = []
    for start in range(0, len(points), length):
        part = points[start : start + length]
        values = [y for _, y in part]
        found.append((part[-1][0], sum(values) / len(values), min(values), max(values)))
    return found


def _range(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin
