"""`report.html` of a stage: curves, figures, samples, configuration and lineage on one page that needs nothing else.

The curves are SVG drawn here, so that the page opens on a machine without network, years later.
"""

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import Any

from pipeline.folder import write_atomic
from pipeline.lineage import CONFIG, LINEAGE
from pipeline.report import METRICS, ROLLOUTS, Row, read_metrics

CHARTS: dict[str, tuple[str, ...]] = {
    "Reward": ("reward/*/mean",),
    "Pass rate": ("reward/*/pass_rate",),
    "Loss, nats a token": ("loss/nll_mean", "eval/nll_mean"),
    "Divergence from the reference, nats a token": ("loss/kl_mean",),
    "Trainer and engine disagree, nats a token": ("mismatch/abs_mean", "mismatch/abs_max"),
    "Length, tokens": ("rollout/length/mean",),
    "Not ended, not judged": ("rollout/truncated_rate", "reward/*/left_out_rate"),
    "Gradient norm": ("train/grad_norm",),
    "Learning rate": ("train/learning_rate",),
    "Seconds": ("time/*_seconds",),
    "Tokens a second": ("*/tokens_per_second",),
}
"""Title of each chart and the keys it draws; one that would be empty is left out."""

SAMPLES_SHOWN = 24
POINTS = 200
WIDTH, HEIGHT, LEFT, BOTTOM = 440, 190, 58, 22
COLORS = ("#2f6fdb", "#d9662c", "#2a9d6f", "#a44bc4", "#c33a4b", "#7d7a1e", "#5b6b7b")

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
.key { font-weight: 400; margin-left: .8em; white-space: nowrap; }
svg { width: 100%; height: auto; overflow: visible; } svg text { font-size: 11px; fill: currentColor; opacity: .7; }
.grid { stroke: var(--line); } .dot { fill: transparent; }
table { border-collapse: collapse; width: 100%; } .figures { width: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.said, pre { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 12px; }
summary { cursor: pointer; }
"""


def write_html(folder: Path) -> None:
    """Writes `report.html` of what a stage's folder holds by now; parts that are not there are left out."""
    rows = read_metrics(folder)
    steps = f", {int(rows[-1]['step'])} steps" if rows else ""
    title = escape(f"{folder.resolve().parent.name} / {folder.resolve().name}")
    parts = [
        f"<h1>{title}{steps}</h1>",
        _charts(rows),
        _figures(rows[-1]) if rows else "",
        _samples(folder / ROLLOUTS),
        _document("Configuration", folder / CONFIG),
        _document("Lineage", folder / LINEAGE),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    # Text sampled from a model may hold half a surrogate pair, which has no UTF-8.
    write_atomic(folder / "report.html", page.encode("utf-8", "backslashreplace").decode("utf-8"))


def chart(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """One figure: each series' (step, value) points as a line over common axes. Values are finite."""
    values = [value for points in series.values() for _, value in points]
    steps = [step for points in series.values() for step, _ in points]
    ticks = axis_ticks(min(values), max(values))
    low, high, first, last = min(ticks[0], *values), max(ticks[-1], *values), min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (HEIGHT - 8 - BOTTOM)

    drawn = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in ticks
    ]
    for step, anchor in ((first, "start"), (last, "end")):
        drawn.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{step:g}</text>')
    keys: list[str] = []
    for index, (name, points) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        keys.append(f'<span class="key" style="color:{color}">{escape(name)}</span>')
        places = [(x(step), y(value), f"{name}, step {step:g}: {value:.6g}") for step, value in thin(points)]
        line = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in places)
        drawn.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{line}"/>')
        dot = f'stroke="{color}"' if len(places) == 1 else ""
        drawn += [
            f'<circle class="dot" {dot} cx="{left:.1f}" cy="{top:.1f}" r="4"><title>{escape(said)}</title></circle>'
            for left, top, said in places
        ]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}{''.join(keys)}</figcaption>{svg}</figure>"


def axis_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers (1, 2 or 5 times a power of ten apart) of which the outer ones enclose low and high."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 4 >= high - low)
    return [index * size for index in range(math.floor(low / size), math.ceil(high / size) + 1)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 200 points: the means of neighbours in equal shares, where there are more."""
    stride = -(-len(points) // POINTS)
    if stride <= 1:
        return list(points)
    shares = [points[first : first + stride] for first in range(0, len(points), stride)]
    return [
        (math.fsum(s for s, _ in share) / len(share), math.fsum(v for _, v in share) / len(share)) for share in shares
    ]


def _charts(rows: list[Row]) -> str:
    figures: list[str] = []
    for title, patterns in CHARTS.items():
        keys = {key: None for pattern in patterns for row in rows for key in row if fnmatchcase(key, pattern)}
        series = {
            key: [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])] for key in keys
        }
        drawn = {key: points for key, points in series.items() if points}
        if drawn:
            figures.append(chart(title, drawn))
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>' if figures else ""


def _figures(row: Row) -> str:
    figures = [(key, value) for key, value in row.items() if key != "step"]
    lines = [f'<tr><td>{escape(key)}</td><td class="number">{value:.6g}</td></tr>' for key, value in figures]
    table = f'<table class="figures">{"".join(lines)}</table>'
    return f"<h2>Last step</h2><details><summary>{METRICS}</summary>{table}</details>"


def _samples(folder: Path) -> str:
    """The first samples of the last step that has any."""
    files = sorted(folder.glob("step-*.jsonl"))
    if not files:
        return ""
    lines = files[-1].read_text(encoding="utf-8").split("\n")[:-1]
    body = "".join(_sample(json.loads(line)) for line in lines[:SAMPLES_SHOWN])
    head = "<tr><th>prompt</th><th>completion</th><th>reward</th><th>verdicts</th></tr>"
    count = f"{min(len(lines), SAMPLES_SHOWN)} of {len(lines)}"
    return f"<h2>Samples: {escape(files[-1].stem)} ({count})</h2><table>{head}{body}</table>"


def _sample(record: dict[str, Any]) -> str:
    judged = "\n".join(
        f"{name} {verdict['status']}"
        + ("" if verdict["score"] is None else f" {verdict['score']:g}")
        + (f": {verdict['detail']}" if verdict["detail"] else "")
        for name, verdict in record["verdicts"].items()
    )
    reward = "left out" if record["reward"] is None else f"{record['reward']:g}"
    said = f"{record['completion']} [{record['finish_reason']}]"
    cells = "".join(f'<td class="said">{escape(text)}</td>' for text in (record["prompt"], said, reward, judged))
    return f"<tr>{cells}</tr>"


def _document(title: str, file: Path) -> str:
    if not file.is_file():
        return ""
    content = escape(file.read_text(encoding="utf-8"))
    return f"<h2>{title}</h2><details><summary>{file.name}</summary><pre>{content}</pre></details>"
