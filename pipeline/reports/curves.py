"""Charts over the steps of a stage and the figures to see first, from the rows of its `metrics.jsonl`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.reports.charts import LineChart, Points
from pipeline.reports.files import MetricsRow


@dataclass(frozen=True, slots=True)
class Chart:
    """The title and unit of a line chart, and the keys of its curves with their names. A `*` in a key stands for one
    part of it, which replaces `{}` in the name; an empty name is that part alone."""

    title: str
    unit: str
    curves: dict[str, str]


LEARNING = (
    Chart("Reward", "", {"reward/total/mean": "total", "reward/*/mean": ""}),
    Chart("Pass rate", "score of 1 or more", {"reward/*/pass_rate": ""}),
    Chart("Loss", "nats a token", {"loss/nll_mean": "training", "eval/nll_mean": "held out"}),
    Chart(
        "Divergence from the teachers", "nats a token", {"loss/reverse_kl_mean": "all", "teacher/*/reverse_kl_mean": ""}
    ),
    Chart("Multi-token prediction", "share of drafts accepted", {"mtp/acceptance_*": ""}),
    Chart(
        "Accuracy",
        "share of pairs",
        {"reward_model/accuracy": "training", "dpo/accuracy": "training", "eval/*/accuracy": ""},
    ),
    Chart(
        "Margin",
        "better less worse",
        {"reward_model/margin_mean": "training", "dpo/margin_mean": "training", "eval/*/margin_mean": ""},
    ),
    Chart("Implicit reward", "", {"dpo/chosen_mean": "better", "dpo/rejected_mean": "worse"}),
    Chart("Squared error", "", {"reward_model/squared_error_mean": "training", "eval/*/squared_error_mean": ""}),
    Chart("Completion length", "tokens", {"rollout/length/mean": "mean"}),
    Chart(
        "Cut short, not judged", "share", {"rollout/truncated_rate": "cut short", "reward/*/left_out_rate": "left out"}
    ),
    Chart("Repetition", "share of 4-grams that occurred before", {"rollout/repetition_rate": "repeated"}),
    Chart("Groups that can teach", "share with a spread of rewards", {"rollout/mixed_groups_rate": "mixed groups"}),
    Chart("Validation", "share that passes", {"validation/*/pass@1_greedy": "", "validation/*/accuracy": ""}),
    Chart(
        "Win rate",
        "share of a win",
        {"validation/*/win_rate": "", "validation/*/length_controlled_win_rate": "same length"},
    ),
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
    Chart("Lag of sampled tokens", "versions", {"rollout/lag_mean": "mean", "rollout/lag_max": "largest"}),
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
    Chart("Seconds of a step", "", {"time/step_seconds": "in all", "time/*_seconds": ""}),
    Chart("Idle devices", "seconds of a step", {"idle/ranks_seconds": "ranks", "idle/engines_seconds": "engines"}),
    Chart("Tokens a second", "", {"rollout/tokens_per_second": "sampled", "train/tokens_per_second": "trained"}),
    Chart("Memory of the fullest rank", "GiB", {"memory/peak_gib": "peak"}),
    Chart("Reward pools at work", "share of workers' time", {"reward_pool/*/utilisation": ""}),
    Chart("Waiting for a verdict", "seconds, median of groups", {"reward_pool/*/latency_p50": ""}),
    Chart("Groups waiting for a worker", "most at a time", {"reward_pool/*/queue_depth_max": ""}),
    Chart("No verdict", "share", {"reward/*/failure_rate": "{} failed", "reward/*/abstain_rate": "{} abstained"}),
)
CHARTS = {"What it learns": LEARNING, "How it trains": TRAINING, "The machine": MACHINE}
REWARDS = {"reward/total/mean": "total", "reward/*/mean": ""}
"""Keys of the rewards, each of which looks the same on every chart."""
HEADLINE = {
    "reward/total/mean": "reward",
    "reward/*/pass_rate": "{} pass rate",
    "eval/nll_mean": "held-out loss",
    "loss/nll_mean": "loss",
    "eval/*/accuracy": "{} accuracy",
    "reward_model/accuracy": "accuracy in training",
    "dpo/accuracy": "accuracy in training",
    "loss/reverse_kl_mean": "divergence from the teachers",
    "rollout/length/mean": "tokens a completion",
    "loss/kl_mean": "divergence",
    "time/step_seconds": "seconds a step",
}
"""Keys and names of the figures to see first, in this order; at most `_HEADLINE_FIGURES` of them."""
TREND = {
    "reward/total/mean": "reward",
    "eval/*/accuracy": "{} accuracy",
    "reward_model/accuracy": "accuracy in training",
    "dpo/accuracy": "accuracy in training",
    "loss/nll_mean": "loss",
    "loss/reverse_kl_mean": "divergence from the teachers",
}
"""Keys of the curve that stands for a stage: the first that it has."""
STEP_SECONDS = "time/step_seconds"
_HEADLINE_FIGURES = 8


def line_charts(rows: Sequence[MetricsRow]) -> dict[str, list[LineChart]]:
    """The charts of each section, without those that have no points."""
    points = metric_points(rows)
    looks = {name: number for number, name in enumerate(_series(REWARDS, points))}
    charts = {section: list(section_charts) for section, section_charts in CHARTS.items()}
    charts["What it learns"] += [
        Chart(f"Outcomes of {label}", "share of verdicts", {f"reward/{label}/outcome/*_rate": ""})
        for label in dict.fromkeys(key.split("/")[1] for key in points if "/outcome/" in key)
    ]
    return {
        section: [
            LineChart(chart.title, chart.unit, series, looks)
            for chart in section_charts
            if (series := _series(chart.curves, points))
        ]
        for section, section_charts in charts.items()
    }


def seconds_by_phase(rows: Sequence[MetricsRow]) -> dict[str, float]:
    """Seconds that each phase took in all steps; `other` is the time that no phase has counted."""
    keys = {match[1]: key for key in metric_points(rows) if (match := re.fullmatch(r"time/(\w+)_seconds", key))}
    phases = {phase: math.fsum(row.get(key, 0.0) for row in rows) for phase, key in keys.items()}
    total = phases.pop("step", 0.0)
    phases["other"] = total - math.fsum(phases.values())
    return {phase: seconds for phase, seconds in phases.items() if seconds > 0}


def headline(rows: Sequence[MetricsRow]) -> list[tuple[str, float | None, float]]:
    """Name, start and end of the figures to see first: means over the first and the last twentieth of the steps. A
    figure that was measured once has no start."""
    return [(name, *start_and_end(points)) for name, points in headline_series(rows).items()]


def headline_series(rows: Sequence[MetricsRow]) -> dict[str, Points]:
    """The points of the figures to see first, by name."""
    return dict(list(_series(HEADLINE, metric_points(rows)).items())[:_HEADLINE_FIGURES])


def start_and_end(points: Points) -> tuple[float | None, float]:
    """Means over the first and the last twentieth of a curve; no start where it has one point."""
    first, last = _ends(points)
    return first if len(points) > 1 else None, last


def trend(rows: Sequence[MetricsRow]) -> str:
    """The curve that stands for the stage in words: `reward 0.3 → 0.7`; empty for a stage without one."""
    for name, points in _series(TREND, metric_points(rows)).items():
        if len(points) > 1:
            first, last = _ends(points)
            return f"{name} {first:.3g} → {last:.3g}"
    return ""


def metric_points(rows: Sequence[MetricsRow]) -> dict[str, Points]:
    """The finite (step, value) points of every key, at least one. A share of outcomes that a step lacks is 0, since no
    verdict had that outcome."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if math.isfinite(value):
                points.setdefault(key, []).append((row["step"], value))
    for key in points:
        means = points.get(f"{key.partition('/outcome/')[0]}/mean")
        if "/outcome/" in key and means:
            shares = dict(points[key])
            points[key] = [(step, shares.get(step, 0.0)) for step, _ in means]
    return dict(points)


def _series(curves: dict[str, str], points: dict[str, Points]) -> dict[str, Points]:
    """The points of the keys that fit a pattern, by name; the first pattern that fits names a key."""
    names: dict[str, str] = {}
    for pattern, name in curves.items():
        regex = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)"))
        for key in points:
            if key not in names and (match := regex.fullmatch(key)):
                names[key] = (name or " ".join("{}" for _ in match.groups())).format(*match.groups()).replace("_", " ")
    series: dict[str, Points] = {}
    for key, name in names.items():
        series[key if name in series else name] = points[key]
    return series


def _ends(points: Points) -> tuple[float, float]:
    """Means of the first and of the last twentieth."""
    size = max(len(points) // 20, 1)
    return fmean(value for _, value in points[:size]), fmean(value for _, value in points[-size:])
