"""Pages without anything outside them: one skeleton, one style sheet, one chart."""

from partialfc.records.pages.chart import Series, dot_chart, line_chart, steps_of
from partialfc.records.pages.page import render, time_parts

__all__ = ["Series", "dot_chart", "line_chart", "render", "steps_of", "time_parts"]
