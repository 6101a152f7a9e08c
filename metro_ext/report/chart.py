"""A panel as an inline SVG with a text alternative; the page's script adds values on hover."""

import math
from typing import NamedTuple

from metro_ext.report.markup import Html, element, join, table
from metro_ext.report.panels import Curve, Panel

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 20, 10, 36


class Axis(NamedTuple):
    """From a value to a place in the drawing: low and high lie at `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def figure(panel: Panel, curves: list[Curve], names: list[str]) -> Html:
    """The panel with its caption, legend, and a table of what the curves come to."""
    x, y = axes(panel, curves)
    drawing = element(
        "svg",
        element("desc", "; ".join(_spoken(panel, curve, names) for curve in curves)),
        _grid(panel, x, y),
        *(_drawn(curve, x, y) for curve in curves),
        element("g", class_="cursor"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{panel.title} against steps",  # a <title> would pop up over the values
        tabindex="0",
        class_="chart",
        data_axes=",".join(f"{value:.6g}" for value in (*x[:4], *y[:4], y.logarithmic)),
        data_percent="1" if panel.unit.startswith("%") else "",
    )
    unit = f", {panel.unit}" if panel.unit else ""
    return element(
        "figure",
        element("figcaption", element("strong", panel.title), element("span", unit, class_="unit")),
        drawing,
        _legend(curves),
        element(
            "details", element("summary", "Values"), _values(panel, curves, names), class_="values"
        ),
    )


def axes(panel: Panel, curves: list[Curve]) -> tuple[Axis, Axis]:
    """Steps from 0, and values between the round numbers around them."""
    steps = max(step for curve in curves for step, _ in curve.extremes)
    x = Axis(0, max(steps, 1), _LEFT, WIDTH - _RIGHT)
    values = [value for curve in curves for _, value in curve.extremes]
    low, high = min(values), max(values)
    if panel.logarithmic:
        low, high = low / 1.2, high * 1.2
    else:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        floor = 0.0 if low >= 0 else -math.inf
        low, high = max(low - margin, floor), high + margin
    return x, Axis(low, high, HEIGHT - _BOTTOM, _TOP, panel.logarithmic)


def ticks(axis: Axis, count: int) -> list[float]:
    """About so many round numbers within an axis."""
    if axis.logarithmic and axis.high / axis.low >= 8:
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        digits = (1,) if last - first > 4 else (1, 3) if last - first > 1 else (1, 2, 5)
        found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        return [value for value in found if axis.low <= value <= axis.high]
    rough = (axis.high - axis.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def shown(value: float, percent: bool = False) -> str:
    """A number to read: four digits, thousands and millions shortened."""
    if percent:
        return f"{value:.1%}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'K' else size):.4g}{unit}"
    return f"{value:.4g}"


def _grid(panel: Panel, x: Axis, y: Axis) -> Html:
    percent = panel.unit.startswith("%")
    parts = []
    for value in ticks(y, 4):
        place = f"{y.place(value):.1f}"
        label = f"{100 * value:.4g}%" if percent else shown(value)
        parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=place, y2=place))
        parts.append(element("text", label, x=_LEFT - 6, y=place, dy=".32em", text_anchor="end"))
    for value in ticks(x, 5):
        if value == int(value):
            place = f"{x.place(value):.1f}"
            bottom = HEIGHT - _BOTTOM + 15
            parts.append(element("text", shown(value), x=place, y=bottom, text_anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(element("text", "step", x=middle, y=HEIGHT - 4, text_anchor="middle"))
    return element("g", *parts, class_="grid", aria_hidden="true")


def _drawn(curve: Curve, x: Axis, y: Axis) -> Html:
    """The line, with a dot where a line through one point could not be seen, and held-out values
    marked, of which there are few. Behind the means of a long one, from lowest to highest."""
    places = _places(curve.points, x, y)
    data = " ".join(f"{step}:{value:.6g}" for step, value in curve.points)
    attributes = {"data_points": data, "data_label": curve.series.label, "data_run": curve.run}
    kind = f"curve run{curve.run} {curve.series.style}"
    if curve.series.level:
        height = places[-1][1]
        line = element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=height, y2=height)
        return element("g", line, class_=kind, data_level="1", **attributes)
    parts = []
    if curve.is_long:
        parts.append(_line(_places(curve.extremes, x, y), class_="spread"))
    pieces, begin = [], 0
    for end in [*sorted(gap for gap in curve.gaps if gap), len(places)]:
        pieces.append(places[begin:end])
        begin = end
    for piece in pieces:
        if len(piece) > 1:
            parts.append(_line(piece))
        if len(piece) == 1 or (curve.series.style == "dashed" and len(places) <= 40):
            parts += [element("circle", cx=px, cy=py, r="2.4") for px, py in piece]
    return element("g", *parts, class_=kind, **attributes)


def _places(points: list[tuple[int, float]], x: Axis, y: Axis) -> list[tuple[str, str]]:
    return [(f"{x.place(step):.1f}", f"{y.place(value):.1f}") for step, value in points]


def _line(places: list[tuple[str, str]], **attributes: str) -> Html:
    points = " ".join(",".join(place) for place in places)
    return element("polyline", points=points, **attributes)


def _legend(curves: list[Curve]) -> Html:
    """The kinds of line; which colour is which run stands at the page's top."""
    seen = list(dict.fromkeys((curve.series.style, curve.series.label) for curve in curves))
    if len(seen) == 1:
        return Html("")
    items = []
    for style, label in seen:
        line = element("line", x1="1", x2="27", y1="5", y2="5")
        sample = element("svg", line, viewBox="0 0 28 10", class_=style, aria_hidden="true")
        items.append(element("li", sample, label))
    return element("ul", *items, class_="lines")


def _spoken(panel: Panel, curve: Curve, names: list[str]) -> str:
    percent = panel.unit.startswith("%")
    (first_step, first), (last_step, last) = curve.extremes[0], curve.extremes[-1]
    who = f"{names[curve.run]}, {curve.series.label}"
    if curve.series.level or len(curve.points) == 1:
        return f"{who}: {shown(last, percent)}"
    return (
        f"{who}: from {shown(first, percent)} at step {first_step} "
        f"to {shown(last, percent)} at step {last_step}"
    )


def _values(panel: Panel, curves: list[Curve], names: list[str]) -> Html:
    percent = panel.unit.startswith("%")

    def cell(point: tuple[int, float]) -> Html:
        at = element("small", f"step {point[0]}")
        return join([shown(point[1], percent), " ", at])

    rows = []
    for curve in curves:
        lowest = min(curve.extremes, key=lambda point: point[1])
        highest = max(curve.extremes, key=lambda point: point[1])
        who = f"{names[curve.run]}: {curve.series.label}" if len(names) > 1 else curve.series.label
        points = (curve.extremes[0], lowest, highest, curve.extremes[-1])
        rows.append([who, *map(cell, points)])
    return table(["", "first", "lowest", "highest", "last"], rows, f"{panel.title}: values")
