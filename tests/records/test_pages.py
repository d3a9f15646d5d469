"""What all pages share: places on a chart, words that stay words, templates that get all values."""

import re

import jinja2
import pytest

from partialfc.records.pages import Series, dot_chart, line_chart, render, steps_of, time_parts


def test_a_chart_puts_points_where_they_belong():
    """Ends of the axes, by hand: x from 52 to 390, y from 216 up."""
    svg = line_chart([Series("a", [0, 5, 10], [0, 50, 100])], x_label="step")
    points = re.search(r'<polyline[^>]* points="([^"]*)"', svg)[1].split()
    assert [point.split(",")[0] for point in points] == ["52.0", "221.0", "390.0"]
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] == 216.0
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)
    assert line_chart([Series("a", [1], [float("nan")])], x_label="x") == ""
    assert line_chart([Series("a", [1, 2], [0, -1])], x_label="x", log_y=True) == ""
    assert "<circle" in line_chart([Series("a", [3], [7])], x_label="x")
    assert steps_of([0, 1, 2], [5, 6]) == ([0, 1, 1, 2], [5, 5, 6, 6])


def test_numbers_beside_a_logarithmic_axis_are_round():
    for low, high in ((0.02, 0.7), (3.1, 4.6), (1, 900), (1e-6, 1)):
        svg = line_chart([Series("a", [0, 1], [low, high])], x_label="x", log_y=True)
        words = re.findall(r'text-anchor="end">([^<]*)</text>', svg)[:-1]
        assert len(words) >= 3
        for word in words:
            assert float(word) == float(f"{float(word):.2g}"), words
            assert low <= float(word) <= high * 1.3


def test_a_single_long_line_shows_the_range_of_each_stretch_and_several_do_not():
    x = range(3000)
    one, other = (Series(name, x, [value % 7 for value in x]) for name in "ab")
    (edge,) = re.findall(r'<polygon[^>]* points="([^"]*)"', line_chart([one], x_label="x"))
    assert len(edge.split()) == 600, "there along the largest, back along the smallest"
    assert "<polygon" not in line_chart([one, other], x_label="x")


def test_dots_stand_where_their_numbers_are_and_the_bar_at_their_mean():
    svg = dot_chart([("a<b", [1.0, 2.0]), ("none", []), ("c", [3.0])], label="x", form=str)
    at = [float(x) for x in re.findall(r'<circle[^>]* cx="([^"]*)"', svg)]
    mean = float(re.search(r'class="mean" x1="([^"]*)"', svg)[1])
    assert at[0] < mean < at[1] < at[2]
    assert mean == pytest.approx((at[0] + at[1]) / 2, abs=0.1)
    assert "a&lt;b" in svg
    assert ">none<" in svg
    assert dot_chart([("a", [])], label="x", form=str) == ""


def test_shares_of_time_leave_out_what_took_none():
    parts = time_parts({"train": 30.0, "save": 10.0, "restore": 0.0, "wall": 40.0, "goodput": 0.75})
    assert [(part.words, part.share) for part in parts] == [
        ("training 30 s, 75.0%", 0.75),
        ("saving 10 s, 25.0%", 0.25),
    ]
    assert time_parts({}) == []


def test_a_value_is_text_and_one_that_is_missing_is_an_error(tmp_path):
    template = tmp_path / "page.html"
    template.write_text('{% extends "base.html" %}{% block body %}{{ word }}{% endblock %}')
    page = render(template, title="<b>", word='<script>"')
    assert "<h1>&lt;b&gt;</h1>" in page
    assert "&lt;script&gt;" in page
    assert "refresh" not in page
    assert '<meta http-equiv="refresh" content="5">' in render(
        template, title="", word="", reload=5
    )
    with pytest.raises(jinja2.UndefinedError, match="word"):
        render(template, title="")
