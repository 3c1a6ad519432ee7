"""What every page has in common, and the geometry of inline charts."""

import base64
import hashlib
import html
import re

import pytest
from markupsafe import Markup

from raylava.pages.charts import bar_heights, line_chart, stage_graph
from raylava.pages.render import count, duration, figure, render, render_with_plots, signed, trusted

SECTION = {"title": "<b>t</b>", "folded": False, "html": trusted("<p>made of Markdown</p>"), "plots": []}


def test_page_forbids_all_requests_and_has_light_and_dark_colors() -> None:
    page = render("comparison.html", title="<i>title</i>", comparisons=[])
    assert "default-src 'none'" in page
    assert "script-src" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "&lt;i&gt;title&lt;/i&gt;" in page
    assert "://" not in page


def test_only_html_of_a_renderer_is_not_escaped() -> None:
    page = render_with_plots("sweep.html", title="<i>title</i>", sections=[SECTION])
    assert "<p>made of Markdown</p>" in page
    assert "<i>title" not in page


def test_inline_script_is_the_one_that_the_policy_allows() -> None:
    page = render("comparison.html", script="gallery.js", title="t", comparisons=[])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(page)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (figure(0.123456), '<data value="0.123456">0.1235</data>'),
        (figure(1234.5), '<data value="1234.5">1,234</data>'),
        (figure(None), "–"),
        (count(1234567), '<data value="1234567">1,234,567</data>'),
        (signed(0.25), '<data value="0.25">+0.250</data>'),
        (duration(9.5), '<data value="9.5">9.5 s</data>'),
        (duration(200), '<data value="200">3 min 20 s</data>'),
        (duration(7260), '<data value="7260">2 h 01 min</data>'),
    ],
)
def test_number_is_shown_rounded_beside_its_exact_value(value: Markup, text: str) -> None:
    assert value == text


def test_line_chart_spans_its_area_from_zero() -> None:
    chart = line_chart([[1, 2.0], [11, 4.0]])
    assert chart is not None
    left, _, right, bottom = chart.area
    (first_x, first_y), (last_x, _) = (map(float, point.split(",")) for point in chart.points.split())
    assert (first_x, last_x) == (left, right)
    low, high = chart.y_range
    assert low == 0
    assert (bottom - first_y) / (bottom - chart.area[1]) * high == pytest.approx(2.0, abs=0.02)
    assert [tick.label for tick in chart.y_ticks] == ["0", "2", "4"]


@pytest.mark.parametrize("points", [[[5, 0.0]], [[1, -1.0], [2, -1.0]], [[1, 7e6], [2, 7e6]]])
def test_constant_or_single_value_has_a_chart(points: list[list[float]]) -> None:
    chart = line_chart(points)
    assert chart is not None
    assert chart.x_range[0] < chart.x_range[1]
    assert chart.y_range[0] < chart.y_range[1]
    assert chart.y_ticks
    assert line_chart([]) is None


def test_stages_are_placed_right_of_their_inputs_and_as_near_as_possible() -> None:
    inputs = {
        "a": [],
        "p": ["a"],
        "i": [],
        "f": ["i", "p"],
        "u": [],
        "e": ["f"],
        "eu": ["u"],
        "e of a long name " * 3: ["f"],
    }
    graph = stage_graph(inputs)
    columns = {name: box.x for name, box in graph.boxes.items()}
    assert columns["a"] < columns["p"] == columns["i"] < columns["f"] == columns["u"] < columns["e"] == columns["eu"]
    assert len({(box.x, box.y) for box in graph.boxes.values()}) == len(inputs)
    assert len(graph.edges) == 6
    assert list(graph.boxes.values())[-1].label.endswith("…")
    assert all(box.x + box.width <= graph.width and box.y + box.height <= graph.height for box in graph.boxes.values())


def test_highest_bar_fills_the_histogram() -> None:
    assert bar_heights([1, 0, 4]) == [25.0, 0.0, 100.0]
    assert bar_heights([]) == []
