"""Geometry of inline charts: line charts with ticks, and a graph of boxes in columns. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_WIDTH, _HEIGHT = 320.0, 176.0  # of a line chart, about the pixels it is displayed with
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 10.0, 22.0
_TICKS = 4
_BOX_WIDTH, _BOX_HEIGHT, _COLUMN_GAP, _ROW_GAP = 234.0, 62.0, 44.0, 14.0
_MARGIN = 2.0
_LABEL = 28  # characters of a box's label


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position in the chart and its label."""

    position: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """One line in a chart of `width` × `height`. `points` are in the chart's coordinates, as SVG takes them.

    The first point of `x_range` and `y_range` is at the lower left corner of the plot area, the second at its upper
    right one; `area` is (left, top, right, bottom).
    """

    points: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = _WIDTH
    height: float = _HEIGHT
    area: tuple[float, float, float, float] = (_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM)


def line_chart(points: Sequence[Sequence[float]]) -> LineChart | None:
    """Return the chart of (x, y) points, None without points. The y axis starts at 0 where no value is below."""
    if not points:
        return None
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    x_range = _range(min(xs), max(xs))
    y_range = _range(min(0.0, *ys), max(ys) * 1.05 if max(ys) > 0 else max(ys))
    left, top, right, bottom = LineChart.area

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in zip(xs, ys, strict=True)))
    x_ticks = tuple(Tick(place(value, y_range[0])[0], _label(value)) for value in _nice_values(*x_range))
    y_ticks = tuple(Tick(place(x_range[0], value)[1], _label(value)) for value in _nice_values(*y_range))
    return LineChart(line, x_range, y_range, x_ticks, y_ticks)


def _range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _nice_values(low: float, high: float) -> list[float]:
    """Return about _TICKS multiples of 1, 2 or 5 times a power of ten within a range."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _label(value: float) -> str:
    """Return a short label: 12k for 12,000."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            divisor = {"G": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Box:
    """A node of a graph at its place; `label` is cut to what fits into the box, `name` is complete."""

    name: str
    label: str
    x: float
    y: float
    width: float = _BOX_WIDTH
    height: float = _BOX_HEIGHT


@dataclass(frozen=True)
class Graph:
    """Boxes in columns, each to the right of its inputs, and the curves between them as SVG paths."""

    width: float
    height: float
    boxes: dict[str, Box] = field(default_factory=dict)
    edges: tuple[str, ...] = ()


def stage_graph(inputs: Mapping[str, Sequence[str]]) -> Graph:
    """Lay out nodes that are given in an order in which each follows its inputs, with the names of these."""
    columns = _columns(inputs)
    rows: dict[int, int] = {}
    boxes = {}
    for name, column in columns.items():
        row = rows[column] = rows.get(column, -1) + 1
        x = _MARGIN + column * (_BOX_WIDTH + _COLUMN_GAP)
        boxes[name] = Box(name, _shorten(name), x, _MARGIN + row * (_BOX_HEIGHT + _ROW_GAP))
    edges = tuple(
        _edge(boxes[source], boxes[name]) for name, sources in inputs.items() for source in sources if source in boxes
    )
    width = max((box.x + box.width for box in boxes.values()), default=0.0) + _MARGIN
    height = max((box.y + box.height for box in boxes.values()), default=0.0) + _MARGIN
    return Graph(width, height, boxes, edges)


def _columns(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the column of each node: as far to the right as the nodes that it is an input of permit."""
    depths: dict[str, int] = {}
    for name, sources in inputs.items():
        depths[name] = max((depths[source] + 1 for source in sources if source in depths), default=0)
    last = max(depths.values(), default=0)
    columns = dict.fromkeys(inputs, last)
    for name in reversed(list(inputs)):
        for source in inputs[name]:
            if source in columns:
                columns[source] = min(columns[source], columns[name] - 1)
    return columns


def _shorten(name: str) -> str:
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"


def _edge(source: Box, target: Box) -> str:
    start, end = source.x + source.width, target.x
    from_y, to_y, middle = source.y + source.height / 2, target.y + target.height / 2, (start + end) / 2
    return f"M{start:g} {from_y:g}C{middle:g} {from_y:g} {middle:g} {to_y:g} {end:g} {to_y:g}"


def bar_heights(counts: Sequence[int]) -> list[float]:
    """Return the height of each bar of a histogram in percent of the highest."""
    highest = max(counts, default=0) or 1
    return [round(100 * count / highest, 2) for count in counts]
