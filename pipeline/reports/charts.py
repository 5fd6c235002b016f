"""Numbers behind the three forms of chart: lines over steps, intervals on an axis, bars of shares.

`templates/macros.html` draws them. Series differ in colour, by a palette that colour-blind people can tell apart, and
lines also in dashes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Points = Sequence[tuple[float, float]]

_MAX_POINTS = 200


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values with round numbers inside it."""

    low: float
    high: float
    ticks: Sequence[float] = ()

    def share(self, value: float) -> float:
        """Position of `value` between low (0) and high (1)."""
        return (value - self.low) / ((self.high - self.low) or 1)


@dataclass(frozen=True, slots=True)
class LineChart:
    """Named series of (step, value) points, each with at least one, all finite. `looks` numbers the colour and dashes
    of series that look the same on several charts."""

    title: str
    unit: str
    series: Mapping[str, Points]
    looks: Mapping[str, int]

    @property
    def steps(self) -> Axis:
        """From the first step to the last."""
        steps = [step for points in self.series.values() for step, _ in points]
        return Axis(min(steps), max(steps))

    @property
    def values(self) -> Axis:
        """Around the values of all series."""
        return value_axis(value for points in self.series.values() for _, value in points)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its interval, and the bound that decides about it. `color` is a class of the style sheet: `good`,
    `bad`, `busy` or `idle`."""

    name: str
    value: float
    low: float
    high: float
    color: str = "busy"
    note: str = ""
    bound: float | None = None


def interval_axis(intervals: Iterable[Interval], *, with_zero: bool) -> Axis:
    """The common axis of intervals under each other."""
    values = [value for row in intervals for value in (row.low, row.high, row.value, row.bound) if value is not None]
    return value_axis([*values, 0.0] if with_zero else values)


def value_axis(values: Iterable[float]) -> Axis:
    """An axis with two to six ticks, 1, 2 or 5 times a power of ten apart, the outer of which enclose the values."""
    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0, 1)
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 4 >= high - low)
    ticks = [number * size for number in range(math.floor(low / size), math.ceil(high / size) + 1)]
    return Axis(min(ticks[0], *values), max(ticks[-1], *values), ticks)


def svg_points(points: Points, chart: LineChart) -> str:
    """The points in SVG's notation, in a plot of 308 by 142 from (44, 8); of more than 200, means of neighbours."""
    stride = -(-len(points) // _MAX_POINTS)
    if stride > 1:
        parts = [points[first : first + stride] for first in range(0, len(points), stride)]
        points = [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]
    x, y = chart.steps, chart.values
    return " ".join(f"{44 + 308 * x.share(step):.1f},{150 - 142 * y.share(value):.1f}" for step, value in points)


def sparkline(points: Points, chart: LineChart, levels: str, width: int) -> str:
    """The points in `width` characters from `levels`, lowest first, on the common axes of the chart's series. A column
    without a point repeats the one before; those outside of the points' steps are blank."""
    columns: dict[int, list[float]] = {}
    for step, value in points:
        columns.setdefault(round(chart.steps.share(step) * (width - 1)), []).append(value)
    values = [value for series in chart.series.values() for _, value in series]
    axis = Axis(min(values), max(values))
    text, character = "", " "
    for column in range(max(columns) + 1):
        if column in columns:
            character = levels[round(axis.share(fmean(columns[column])) * (len(levels) - 1))]
        text += character
    return text
