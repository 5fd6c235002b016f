"""A stage's `metrics.jsonl` as charts, and as the few figures to see first."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.reports.charts import Points, area_chart, line_chart, sparkline
from pipeline.reports.files import Row
from pipeline.reports.page import Markup, folded, section, table, tag, tiles


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: its title and unit, and the keys it draws with the name of each curve. A `*` in a key stands for one
    part of it, which stands where the name has `{}`, and is the name where that is empty."""

    title: str
    unit: str
    curves: dict[str, str]


LEARNING = (
    Chart("Reward", "", {"reward/total/mean": "total", "reward/*/mean": ""}),
    Chart("Pass rate", "score of 1 or more", {"reward/*/pass_rate": ""}),
    Chart("Loss", "nats a token", {"loss/nll_mean": "training", "eval/nll_mean": "held out"}),
    Chart("Multi-token prediction", "share of drafts accepted", {"mtp/acceptance_*": ""}),
    Chart("Accuracy", "share of pairs", {"reward_model/accuracy": "training", "eval/*/accuracy": ""}),
    Chart("Margin", "better less worse", {"reward_model/margin_mean": "training", "eval/*/margin_mean": ""}),
    Chart("Squared error", "", {"reward_model/squared_error_mean": "training", "eval/*/squared_error_mean": ""}),
    Chart("Completion length", "tokens", {"rollout/length/mean": "mean"}),
    Chart(
        "Cut short, not judged", "share", {"rollout/truncated_rate": "cut short", "reward/*/left_out_rate": "left out"}
    ),
    Chart("Repetition", "share of 4-grams said before", {"rollout/repetition_rate": "repeated"}),
    Chart("Groups that can teach", "share with a spread of rewards", {"rollout/mixed_groups_rate": "mixed groups"}),
    Chart("Validation", "share that passes", {"validation/*/pass@1_greedy": "", "validation/*/accuracy": ""}),
)
TRAINING = (
    Chart("Divergence from the reference", "nats a token", {"loss/kl_mean": "KL"}),
    Chart(
        "Entropy",
        "nats a token",
        {"rollout/entropy_mean": "entropy", "loss/surprisal_mean": "surprisal"},
    ),
    Chart("Ratio clipped", "share of tokens", {"loss/ratio_clipped_mean": "clipped"}),
    Chart("Trainer and engine disagree", "nats a token", {"mismatch/abs_mean": "mean", "mismatch/abs_max": "largest"}),
    Chart("Gap after a weight sync", "nats a token", {"sync/gap_mean": "mean", "sync/gap_max": "largest"}),
    Chart(
        "Load of experts",
        "highest above the mean, in means",
        {"experts/max_vio_mean": "mean of layers", "experts/max_vio_max": "worst layer"},
    ),
    Chart("Evenness of experts", "share", {"experts/entropy_mean": "entropy", "experts/dropped_rate": "dropped"}),
    Chart("Experts without a token", "of all layers, in a step", {"experts/dead_count": "dead"}),
    Chart("Losses of balance", "sum of layers", {"loss/*_balance_mean": ""}),
    Chart("Gradient norm", "", {"train/grad_norm": "norm"}),
    Chart("Learning rate", "", {"train/learning_rate": "rate"}),
)
MACHINE = (
    Chart("Tokens a second", "", {"rollout/tokens_per_second": "spoken", "train/tokens_per_second": "trained"}),
    Chart("Memory of the fullest rank", "GiB", {"memory/peak_gib": "peak"}),
    Chart("Reward pools at work", "share of workers' time", {"reward_pool/*/utilisation": ""}),
    Chart("Waiting for a verdict", "seconds, median of groups", {"reward_pool/*/latency_p50": ""}),
    Chart("Groups waiting for a worker", "most at a time", {"reward_pool/*/queue_depth_max": ""}),
    Chart("No verdict", "share", {"reward/*/failure_rate": "{} failed", "reward/*/abstain_rate": "{} abstained"}),
)
FIRST, LAST = "What it learns", "The machine"
PARTS = {FIRST: LEARNING, "How it trains": TRAINING, LAST: MACHINE}
REWARDS = {"reward/total/mean": "total", "reward/*/mean": ""}
"""The rewards, which look the same on every chart."""
HEADLINES = {
    "reward/total/mean": "reward",
    "reward/*/pass_rate": "{} pass rate",
    "eval/nll_mean": "held-out loss",
    "loss/nll_mean": "loss",
    "eval/*/accuracy": "{} accuracy",
    "reward_model/accuracy": "accuracy in training",
    "rollout/length/mean": "tokens a completion",
    "loss/kl_mean": "divergence",
    "time/step_seconds": "seconds a step",
}
"""Keys of the figures to see first, in this order, and what they are called."""
MAIN = {
    "reward/total/mean": "reward",
    "eval/*/accuracy": "{} accuracy",
    "reward_model/accuracy": "accuracy in training",
    "loss/nll_mean": "loss",
}
"""Keys of the one curve that stands for a stage: the first that it has."""

TILES = 8
STEP_SECONDS = "time/step_seconds"


def curves(rows: Sequence[Row]) -> list[Markup]:
    """The sections of charts, each left out where it would be empty."""
    places = {name: place for place, name in enumerate(_series(REWARDS, rows))}
    drawn = {part: [line_chart(*one, places) for one in _drawn(charts, rows)] for part, charts in PARTS.items()}
    drawn[FIRST] = [*drawn[FIRST], *outcomes(rows)]
    drawn[LAST] = [*phases(rows), *drawn[LAST]]
    return [section(part, tag("div", charts, class_="charts") if charts else "") for part, charts in drawn.items()]


def outcomes(rows: Sequence[Row]) -> list[Markup]:
    """What became of the completions that each reward could judge, as shares upon each other."""
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if match := re.fullmatch(r"reward/([^/]+)/outcome/([^/]+)_rate", key):
            found.setdefault(match[1], {})[match[2].replace("_", " ")] = key
    return [
        area_chart(
            f"Outcomes of {label}",
            {
                outcome: [(row["step"], row.get(key, 0.0)) for row in rows if f"reward/{label}/mean" in row]
                for outcome, key in keys.items()
            },
            "share of verdicts",
        )
        for label, keys in found.items()
    ]


def phases(rows: Sequence[Row]) -> list[Markup]:
    """Where a step's seconds go, phase upon phase; what no phase has counted is `other`."""
    timed = [row for row in rows if math.isfinite(row.get(STEP_SECONDS, math.nan))]
    if not timed:
        return []
    keys = {key: None for row in timed for key in row if re.fullmatch(r"time/\w+_seconds", key) and key != STEP_SECONDS}
    series = {
        key.removeprefix("time/").removesuffix("_seconds"): [
            (row["step"], max(row.get(key, 0.0), 0.0)) for row in timed
        ]
        for key in keys
    }
    counted = [math.fsum(row.get(key, 0.0) for key in keys) for row in timed]
    series["other"] = [
        (row["step"], max(row[STEP_SECONDS] - known, 0.0)) for row, known in zip(timed, counted, strict=True)
    ]
    return [area_chart("Time by phase", series, "seconds a step")]


def headline(rows: Sequence[Row]) -> Markup:
    """The figures to see first, at the end and at the beginning: means over a twentieth of the steps."""
    shown = [(name, *_ends(points)) for name, points in _series(HEADLINES, rows).items() if points]
    return tiles((name, f"{last:.4g}", f"{first:.4g} at the start") for name, first, last in shown[:TILES])


def main_curve(rows: Sequence[Row]) -> tuple[str, Points] | None:
    """Name and points of the curve that stands for the stage."""
    return next(((name, points) for name, points in _series(MAIN, rows).items() if len(points) > 1), None)


def small_curve(rows: Sequence[Row]) -> tuple[Markup, str]:
    """The main curve in small, and in words; nothing where there is none."""
    found = main_curve(rows)
    if found is None:
        return Markup(), ""
    name, points = found
    first, last = _ends(points)
    said = f"{name} {first:.3g} → {last:.3g}"
    return sparkline(points, said), said


def last_figures(rows: Sequence[Row]) -> Markup:
    """All figures of the last step."""
    if not rows:
        return Markup()
    figures = [(key, f"{value:.6g}") for key, value in rows[-1].items() if key != "step"]
    return folded(f"All figures of step {rows[-1]['step']:g}", table(("figure", "value"), figures, numbers=[1]))


def _drawn(charts: Sequence[Chart], rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Points], str]]:
    for chart in charts:
        series: dict[str, Points] = {name: points for name, points in _series(chart.curves, rows).items() if points}
        if series:
            yield chart.title, series, chart.unit


def _series(curves: dict[str, str], rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """By name the finite points of every key that one of the patterns fits; a key is taken by the first that does."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    names: dict[str, str] = {}
    for pattern, name in curves.items():
        fits = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)"))
        for key in keys:
            if key not in names and (found := fits.fullmatch(key)):
                names[key] = (name or " ".join("{}" for _ in found.groups())).format(*found.groups()).replace("_", " ")
    taken: dict[str, list[tuple[float, float]]] = {}
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        taken[name if name not in taken else key] = points
    return taken


def _ends(points: Points) -> tuple[float, float]:
    """Means of the first and of the last twentieth."""
    size = max(len(points) // 20, 1)
    first, last = ([value for _, value in part] for part in (points[:size], points[-size:]))
    return math.fsum(first) / size, math.fsum(last) / size
