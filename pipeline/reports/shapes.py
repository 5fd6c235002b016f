"""Charts of what has no steps: intervals on a line, calibration, and shares of a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.reports.charts import COLORS, axis_ticks
from pipeline.reports.page import Markup, tag

WIDTH, ROW, EDGE = 360, 46, 14
SQUARE = 220
LABEL, CELL, SHADES, DEAD = 56, 14, 8, -1


@dataclass(frozen=True, slots=True)
class Interval:
    """One line of a forest plot: a figure with its interval, the bound that decides, and what came of it: `good`,
    `bad` or `idle`."""

    name: str
    value: float
    low: float
    high: float
    bound: float | None
    kind: str
    note: str = ""


def forest(title: str, intervals: Sequence[Interval], *, zero: bool) -> Markup:
    """Intervals under each other on one axis, a dashed line at each one's bound; with `zero` a line at no difference.

    Every interval is drawn as [low, high] with a dot at its value.
    """
    values = [v for each in intervals for v in (each.low, each.high, each.value, each.bound) if v is not None]
    ticks = axis_ticks(min(values + [0.0] * zero), max(values + [0.0] * zero))
    low, high = ticks[0], ticks[-1]
    bottom = ROW * len(intervals) + 4

    def x(value: float) -> float:
        return EDGE + (value - low) / (high - low) * (WIDTH - 2 * EDGE)

    drawn = [
        (
            tag("line", class_="grid", x1=x(tick), x2=x(tick), y1=0, y2=bottom),
            tag("text", f"{tick:+g}" if zero and tick else f"{tick:g}", x=x(tick), y=bottom + 14, text_anchor="middle"),
        )
        for tick in ticks
    ]
    rows: list[Markup] = []
    if zero:
        rows.append(tag("line", class_="axis", x1=x(0), x2=x(0), y1=0, y2=bottom))
    for place, each in enumerate(intervals):
        y = ROW * place + 32
        said = f"{each.name}: {each.value:.3g}, interval {each.low:.3g} to {each.high:.3g}"
        bound = None if each.bound is None else x(each.bound)
        rows += [
            tag("text", each.name, x=EDGE, y=y - 16, class_="label"),
            tag("text", each.note, x=WIDTH - EDGE, y=y - 16, text_anchor="end"),
            tag("line", class_=f"stem k{each.kind}", x1=x(each.low), x2=x(each.high), y1=y, y2=y),
            tag("line", class_=f"stem k{each.kind}", x1=x(each.low), x2=x(each.low), y1=y - 4, y2=y + 4),
            tag("line", class_=f"stem k{each.kind}", x1=x(each.high), x2=x(each.high), y1=y - 4, y2=y + 4),
            tag("circle", tag("title", said), class_=f"dot k{each.kind}", cx=x(each.value), cy=y, r=4.5),
        ]
        if bound is not None:
            rows.append(tag("line", class_="axis", stroke_dasharray="3 3", x1=bound, x2=bound, y1=y - 11, y2=y + 11))
    box = f"0 0 {WIDTH} {bottom + 18}"
    svg = tag("svg", drawn, rows, viewBox=box, role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), svg, class_="forest")


def reliability(title: str, bins: Sequence[tuple[float, float, int]]) -> Markup:
    """How often what was foretold came true: (foretold, observed, count) of each bin against the diagonal, the size of
    a dot saying how many there are. Foretold shares lie between 0.5 and 1."""
    most = max(count for _, _, count in bins)
    low = 0.5 if min(observed for _, observed, _ in bins) >= 0.5 else 0.0

    def x(value: float) -> float:
        return 34 + (value - 0.5) / 0.5 * (SQUARE - 48)

    def y(value: float) -> float:
        return SQUARE - 24 - (value - low) / (1 - low) * (SQUARE - 38)

    frame = [
        (
            tag("line", class_="grid", x1=x(0.5), x2=x(1), y1=y(at), y2=y(at)),
            tag("text", f"{at:g}", x=28, y=y(at) + 4, text_anchor="end"),
        )
        for at in (low, (low + 1) / 2, 1.0)
    ]
    ends = [tag("text", f"{at:g}", x=x(at), y=SQUARE - 8, text_anchor="middle") for at in (0.5, 0.75, 1.0)]
    diagonal = tag("line", class_="axis", stroke_dasharray="3 3", x1=x(0.5), y1=y(0.5), x2=x(1), y2=y(1))
    line = " ".join(f"{x(told):.1f},{y(seen):.1f}" for told, seen, _ in bins)
    dots = [
        tag(
            "circle",
            tag("title", f"{foretold:.0%} sure, {observed:.0%} right, {count} pairs"),
            class_="dot s0",
            cx=x(foretold),
            cy=y(observed),
            r=2 + 4 * (count / most) ** 0.5,
        )
        for foretold, observed, count in bins
    ]
    curve = tag("polyline", points=line, class_="curve s0")
    box = f"0 0 {SQUARE} {SQUARE}"
    svg = tag("svg", frame, ends, diagonal, curve, dots, viewBox=box, role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), svg, class_="square")


def heat_map(title: str, rows: Mapping[str, Sequence[float]]) -> Markup:
    """A line of cells for each row: the darker the higher, up to twice the mean, which is 1; 0 in another colour."""
    shades: dict[int, list[str]] = {}
    for place, values in enumerate(rows.values()):
        width = (WIDTH - LABEL) / len(values)
        for column, value in enumerate(values):
            shade = min(int(value * SHADES / 2), SHADES - 1) if value else DEAD
            cell = f"M{LABEL + column * width:.2f} {place * CELL}h{width:.2f}v{CELL - 1}h-{width:.2f}z"
            shades.setdefault(shade, []).append(cell)

    def bar(shade: int, path: str) -> Markup:
        if shade == DEAD:
            return tag("path", d=path, class_="bar kbad")
        return tag("path", d=path, class_="bar s0", fill_opacity=(shade + 0.5) / SHADES)

    drawn = [bar(shade, "".join(cells)) for shade, cells in shades.items()]
    names = [
        tag("text", name, x=LABEL - 6, y=place * CELL + CELL - 4, text_anchor="end") for place, name in enumerate(rows)
    ]
    keys = [
        tag("span", tag("svg", bar(shade, "M0 0h24v10h-24z"), viewBox="0 0 24 10", aria_hidden="true"), said)
        for shade, said in {DEAD: "no token", SHADES // 2: "the mean", SHADES - 1: "twice the mean or more"}.items()
    ]
    svg = tag("svg", drawn, names, viewBox=f"0 0 {WIDTH} {len(rows) * CELL}", role="img", aria_label=title)
    return tag("figure", tag("div", keys, class_="keys"), svg, class_="heat")


def bars(rows: Mapping[str, Mapping[str, int]], kinds: Mapping[str, str]) -> Markup:
    """By name the counts of its parts as one bar of shares each. `kinds` gives a part's class of colour; the others are
    coloured in turn, the same part in all bars alike."""
    parts = list(dict.fromkeys(part for counts in rows.values() for part in counts))
    free = [color for place in range(COLORS) if (color := f"s{place}") not in kinds.values()]
    others = [part for part in parts if part not in kinds]
    color = {part: kinds.get(part) or free[others.index(part) % len(free)] for part in parts}
    figures: list[Markup] = []
    for name, counts in rows.items():
        total, left, drawn = sum(counts.values()), 0.0, []
        for part, count in counts.items():
            width = count / total * WIDTH
            drawn.append(tag("rect", class_=f"bar {color[part]}", x=left, y=0, width=max(width - 1, 0.5), height=12))
            left += width
        keys = [
            tag(
                "span",
                tag("svg", tag("rect", class_=f"bar {color[part]}", width=24, height=10), viewBox="0 0 24 10"),
                f"{part} ",
                tag("b", f"{count} ({count / total:.1%})"),
            )
            for part, count in counts.items()
        ]
        svg = tag("svg", drawn, viewBox=f"0 0 {WIDTH} 12", role="img", aria_label=name)
        figures.append(tag("figure", tag("figcaption", name), svg, tag("div", keys, class_="keys")))
    return tag("div", figures, class_="charts")
