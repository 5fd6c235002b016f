"""Charts over steps, as SVG: curves, stacked areas, and small curves without axes.

A series is told from its neighbours by its colour, which colour-blind people can tell apart, and by its dashes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.reports.page import Markup, tag

Points = Sequence[tuple[float, float]]

POINTS = 200
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 170, 44, 8, 8, 20
COLORS = 7
DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 4", "12 4")


@dataclass(frozen=True, slots=True)
class Frame:
    """Axes: where a step and a value lie in the drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        """From the left."""
        return LEFT + (step - self.first) / max(self.last - self.first, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top."""
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def at(self, points: Iterable[tuple[float, float]]) -> str:
        """The points as SVG takes them."""
        return " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)

    def figure(self, title: str, unit: str, keys: Iterable[Markup], drawn: Iterable[Markup], ticks: Sequence[float]):
        """The whole figure around what is drawn; the script finds in it what it needs to read values off."""
        lines = [
            (
                tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=self.y(tick), y2=self.y(tick)),
                tag("text", _short(tick), x=LEFT - 6, y=self.y(tick) + 4, text_anchor="end"),
            )
            for tick in ticks
        ]
        ends = [
            tag("text", f"{step:g}", x=self.x(step), y=HEIGHT - 4, text_anchor=anchor)
            for step, anchor in {self.first: "start", self.last: "end"}.items()
        ]
        cross = tag("line", class_="cross", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM)
        box = f"0 0 {WIDTH} {HEIGHT}"
        return tag(
            "figure",
            tag("figcaption", title, tag("span", f", {unit}" if unit else "", class_="unit")),
            tag("div", keys, class_="keys"),
            tag("svg", lines, ends, drawn, cross, viewBox=box, class_="plot", role="img", aria_label=title),
            tag("div", tag("output"), class_="keys"),
            data_x=f"{self.first:g} {self.last:g} {LEFT} {WIDTH - RIGHT}",
            data_y=f"{self.low!r} {self.high!r} {HEIGHT - BOTTOM} {TOP}",
        )


def line_chart(
    title: str, series: Mapping[str, Points], unit: str = "", places: Mapping[str, int] | None = None
) -> Markup:
    """Each series' (step, value) points as a line over common axes. Values are finite. `places` are those series whose
    look is to be the same on several charts: which of the looks each has."""
    looks = {name: (places or {}).get(name, place) for place, name in enumerate(series)}
    frame, ticks = _frame(list(series.values()))
    drawn: list[Markup] = []
    for name, points in series.items():
        thinned, place = thin(points), looks[name]
        color, dash = f"s{place % COLORS}", DASHES[place % len(DASHES)]
        line = frame.at(thinned)
        drawn.append(tag("polyline", points=line, class_=f"curve {color}", stroke_dasharray=dash, data_name=name))
        if len(thinned) == 1:
            [(step, value)] = thinned
            drawn.append(tag("circle", cx=frame.x(step), cy=frame.y(value), r=3, class_=f"dot {color}"))
    keys = [_key(name, looks[name], _short(points[-1][1])) for name, points in series.items()]
    return frame.figure(title, unit, keys, drawn, ticks)


def area_chart(title: str, series: Mapping[str, Points], unit: str = "") -> Markup:
    """The series stacked upon each other, the first one lowest. All have the same steps; values are finite and >= 0.
    The legend says each one's share."""
    stacked = {name: thin(points) for name, points in series.items()}
    steps = [step for step, _ in next(iter(stacked.values()))]
    base = [0.0] * len(steps)
    layers: list[tuple[str, list[float], list[float]]] = []
    for name, points in stacked.items():
        top = [below + value for below, (_, value) in zip(base, points, strict=True)]
        layers.append((name, base, top))
        base = top
    frame, ticks = _frame([list(zip(steps, base, strict=True)), [(steps[0], 0.0)]])
    drawn = [
        tag(
            "polygon",
            points=f"{frame.at(zip(steps, top, strict=True))} "
            + frame.at(zip(reversed(steps), reversed(below), strict=True)),
            class_=f"area s{place % COLORS}",
            data_name=name,
        )
        for place, (name, below, top) in enumerate(layers)
    ]
    total = math.fsum(value for points in series.values() for _, value in points) or 1.0
    keys = [
        _key(name, place, f"{math.fsum(value for _, value in points) / total:.0%}", solid=True)
        for place, (name, points) in enumerate(series.items())
    ]
    return frame.figure(title, unit, keys, drawn, ticks)


def sparkline(points: Points, title: str) -> Markup:
    """One curve without axes, 120 by 36, its last point marked."""
    thinned = thin(points)
    values = [value for _, value in thinned]
    low, high = min(values), max(values)
    first, last = thinned[0][0], thinned[-1][0]
    places = [
        (3 + (step - first) / ((last - first) or 1) * 112, 32 - (value - low) / ((high - low) or 1) * 28)
        for step, value in thinned
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return tag(
        "svg",
        tag("polyline", points=line, class_="curve s0"),
        tag("circle", cx=places[-1][0], cy=places[-1][1], r=2.6, class_="dot s0"),
        viewBox="0 0 120 36",
        role="img",
        aria_label=title,
    )


def axis_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers (1, 2 or 5 times a power of ten apart) of which the outer ones enclose low and high."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0, 1)
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 4 >= high - low)
    return [index * size for index in range(math.floor(low / size), math.ceil(high / size) + 1)]


def thin(points: Points) -> list[tuple[float, float]]:
    """At most 200 points: the means of neighbours in equal shares, where there are more."""
    stride = -(-len(points) // POINTS)
    if stride <= 1:
        return list(points)
    shares = [points[first : first + stride] for first in range(0, len(points), stride)]
    return [
        (math.fsum(s for s, _ in share) / len(share), math.fsum(v for _, v in share) / len(share)) for share in shares
    ]


def _frame(curves: Sequence[Points]) -> tuple[Frame, list[float]]:
    """Axes that hold all the curves, and their ticks."""
    values = [value for points in curves for _, value in points]
    steps = [step for points in curves for step, _ in points]
    ticks = axis_ticks(min(values), max(values))
    return Frame(min(steps), max(steps), min(ticks[0], *values), max(ticks[-1], *values)), ticks


def _key(name: str, place: int, value: str, *, solid: bool = False) -> Markup:
    dash = None if solid else DASHES[place % len(DASHES)]
    line = tag("line", x1=0, x2=24, y1=5, y2=5, class_=f"swatch s{place % COLORS}", stroke_dasharray=dash)
    swatch = tag("svg", line, viewBox="0 0 24 10", aria_hidden="true")
    return tag("span", swatch, f"{name} ", tag("b", value))


def _short(value: float) -> str:
    """Three digits, and no more characters than a tick has room for."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e5 else f"{value:.2g}".replace("e+0", "e")
    return f"{value:.3g}" if size >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")
