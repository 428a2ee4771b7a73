"""Pictures of a page as SVG that follows the colours of the page: lines, intervals, shares of a whole.

In: numbers. Out: markup, with a text for those who cannot see it. Lines of many points are thinned to the lowest and
highest of each stretch, so that a spike is never thinned away. Cost: linear.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 480, 220
WIDE = 960  # of a picture that has the page for itself
COLOURS = 8
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28
STRETCHES = 300
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A difference and how certain it is; without bounds it is not known."""

    name: str
    value: float
    low: float | None
    high: float | None


def lines(title: str, curves: dict[str, Points], from_zero: bool = False) -> Markup:
    """Curves over optimizer steps, each with its name and last value; empty without a point."""
    curves = {name: _thinned(_finite(points)) for name, points in curves.items() if _finite(points)}
    if not curves:
        return Markup()
    every = [point for points in curves.values() for point in points]
    across = _Axis([x for x, _ in every], LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in every] + [0.0] * from_zero, HEIGHT - BOTTOM, TOP)
    parts = [*(_grid(up, y) for y in up.ticks()), *(_below(across, x) for x in across.ticks(whole=True))]
    for number, points in enumerate(curves.values()):
        places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(Markup('<polyline class="curve c{}" points="{}"/>').format(number, places))
        if len(points) < 30:
            parts += [
                Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(number, across(x), up(y))
                for x, y in points
            ]
    legend = Markup(" ").join(
        Markup('<span class="key c{}">{} {}</span>').format(number, name, short(points[-1][1]))
        for number, (name, points) in enumerate(curves.items())
    )
    return _figure(title, legend, parts, WIDTH, HEIGHT)


def intervals(title: str, rows: list[Interval]) -> Markup:
    """A line each with its interval, around a line at nothing; right of it is better."""
    if not rows:
        return Markup()
    edges = [edge for row in rows for edge in (row.value, row.low, row.high, 0.0) if edge is not None]
    across = _Axis(edges, LEFT + 200, WIDE - RIGHT - 80)
    height = TOP + 26 * len(rows) + BOTTOM
    parts = [
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
            across(0.0), TOP, height - BOTTOM
        )
    ]
    for number, row in enumerate(rows):
        y, sign = TOP + 26 * number + 13, "better" if (row.low or 0) > 0 else "worse" if (row.high or 0) < 0 else "open"
        parts.append(Markup('<text x="4" y="{}">{}</text>').format(y + 4, row.name))
        if row.low is not None and row.high is not None:
            ends = (sign, across(row.low), across(row.high), y)
            parts.append(Markup('<line class="{0}" x1="{1:.1f}" x2="{2:.1f}" y1="{3}" y2="{3}"/>').format(*ends))
        parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="4"/>').format(sign, across(row.value), y))
        shown = Markup('<text class="end" x="{}" y="{}">{:+.4f}</text>').format(WIDE - 4, y + 4, row.value)
        parts.append(shown)
    return _figure(title, Markup(), parts, WIDE, height)


def shares(title: str, parts: dict[str, float], show: Callable[[float], str]) -> Markup:
    """One bar cut into parts, and what each is; a part keeps its colour when others are empty."""
    total = sum(parts.values())
    if total <= 0:
        return Markup()
    pieces = Markup().join(
        Markup('<span class="piece c{}" style="flex-grow:{:.4f}" title="{}"></span>').format(
            number % COLOURS, value / total, name
        )
        for number, (name, value) in enumerate(parts.items())
        if value
    )
    names = Markup(" ").join(
        Markup('<span class="key c{}">{} {} ({:.0%})</span>').format(number % COLOURS, name, show(value), value / total)
        for number, (name, value) in enumerate(parts.items())
        if value
    )
    return Markup('<figure><figcaption>{} {}</figcaption><div class="bar">{}</div></figure>').format(
        title, names, pieces
    )


class _Axis:
    """Numbers to places on the page."""

    def __init__(self, values: list[float], start: float, end: float):
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, whole: bool = False) -> list[float]:
        """Four to eight round numbers."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * times for times in (1, 2, 5, 10) if (self.high - self.low) / (step * times) <= 8)
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def short(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _thinned(points: Points) -> Points:
    if len(points) <= 2 * STRETCHES:
        return points
    size = math.ceil(len(points) / STRETCHES)
    kept: Points = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def _grid(up: _Axis, value: float) -> Markup:
    y = up(value)
    line = Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(LEFT, WIDTH - RIGHT, y)
    return line + Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, y + 4, short(value))


def _below(across: _Axis, value: float) -> Markup:
    text = Markup('<text class="middle" x="{:.1f}" y="{}">{}</text>')
    return text.format(across(value), HEIGHT - 8, short(value))


def _figure(title: str, legend: Markup, parts: list[Markup], width: int, height: int) -> Markup:
    return Markup(
        '<figure><figcaption>{} {}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, legend, width, height, title, Markup("\n").join(parts))
