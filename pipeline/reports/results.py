"""Results of stages: figures with their intervals, rules of gates, and data that was kept and dropped."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.gate import HoldRule, ImproveRule, Rule, ThresholdRule
from pipeline.evaluation.statistics import wilson_interval
from pipeline.gates.rules import Ruling, lower_is_better
from pipeline.reports.charts import Interval
from pipeline.reports.files import read_json_lines
from pipeline.reports.samples import Card, CardAnswer

_OUTCOMES = {"holds": "good", "fails": "bad", "undecided": "idle"}
_ROWS_SHOWN = 4

Figures = Mapping[str, float]


def by_suite(figures: Figures) -> dict[str, dict[str, float]]:
    """Figures named `SUITE/FIGURE` by suite."""
    suites: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in figures.items():
        suite, _, name = key.partition("/")
        suites[suite][name] = value
    return suites


def figure_intervals(figures: Figures) -> list[Interval]:
    """The figures that come with `_low` and `_high`."""
    return [
        Interval(key, value, figures[f"{key}_low"], figures[f"{key}_high"], note=f"{value:.3g}")
        for key, value in figures.items()
        if f"{key}_low" in figures
    ]


def calibration(file: Path) -> list[Interval]:
    """Accuracy of a reward model by confidence, with Wilson intervals; the bound is the mean confidence."""
    return [
        Interval(
            f"{row['low']:.0%} to {row['high']:.0%} sure",
            row["accuracy"],
            *wilson_interval(row["accuracy"] * row["pairs"], row["pairs"]),
            note=f"{row['accuracy']:.0%} right of {row['pairs']} pairs",
            bound=row["confidence"],
        )
        for row in read_json_lines(file)
        if row["pairs"]
    ]


def ruling_interval(ruling: Ruling) -> Interval:
    """The interval that a rule of a gate rests on: of the difference from the parent, or of the figure."""
    value = ruling.candidate if ruling.difference is None else ruling.difference
    note = f"{ruling.candidate:.3g}" + ("" if ruling.parent is None else f" from {ruling.parent:.3g}")
    color = _OUTCOMES[ruling.outcome]
    return Interval(ruling.outcome, value, ruling.low, ruling.high, color, note, _bound(ruling.rule))


def _bound(rule: Rule) -> float | None:
    """The value on one side of which the interval must lie."""
    sign = -1 if lower_is_better(rule.figure) else 1
    match rule:
        case ImproveRule():
            return sign * rule.margin
        case HoldRule():
            return -sign * rule.tolerance
        case ThresholdRule():
            return rule.at_most if rule.at_least is None else rule.at_least


def kept_and_dropped(figures: Figures) -> dict[str, dict[str, int]]:
    """Counts of what was kept, and dropped for each reason, by kind and source of data."""
    fates: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for key, value in figures.items():
        if match := re.fullmatch(r"(?:(.+)/)?dropped/(.+)", key):
            source, reason = match[1], match[2]
            fate = fates[f"Answers of {source}" if source else "Comparisons"]
            fate["kept"] = round(figures[f"{source}/kept" if source else "kept"])
            fate[reason.replace("_", " ")] = round(value)
        elif match := re.fullmatch(r"(source|domain)/(.+)/given", key):
            num_kept = round(figures[f"{match[1]}/{match[2]}/kept"])
            fates[f"Comparisons of {match[1]} {match[2]}"] = {"kept": num_kept, "dropped": round(value) - num_kept}
        elif match := re.fullmatch(r"(sampled/(.+))/without_pair/(.+)", key):
            fate = fates[f"Prompts of {match[2]}"]
            fate["in pairs"] = round(figures[f"{match[1]}/prompts"] - figures[f"{match[1]}/without_pair"])
            fate[match[3].replace("_", " ")] = round(value)
    return fates


def data_cards(folder: Path) -> list[Card]:
    """Rows of a data set that a stage made: comparisons with the best and the worst answer, conversations, or
    prompts for a judge with a verdict."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    import datasets  # takes a second or two, so only stages that made data load it

    loaded = datasets.load_from_disk(str(folder))
    assert isinstance(loaded, datasets.DatasetDict)
    rows = loaded["train"]
    stride = max(len(rows) // _ROWS_SHOWN, 1)
    return [_card(rows[index]) for index in range(0, len(rows), stride)[:_ROWS_SHOWN]]


def _card(row: Mapping[str, Any]) -> Card:
    messages, origin = row["messages"], f"{row['source']} · {row['domain']}"
    if "answers" not in row:
        *prompt, answer = messages
        return Card(_conversation(prompt), [CardAnswer(origin, answer["content"], row.get("score"))])
    answers, scores = row["answers"], row["scores"] or [None] * len(row["answers"])
    places = {"best": 0, "worst": -1} if len(answers) > 1 else {"best": 0}
    return Card(
        _conversation(messages),
        [CardAnswer(f"{rank} of {len(answers)} · {origin}", answers[i], scores[i]) for rank, i in places.items()],
    )


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(
        message["content"] if len(messages) == 1 else f"{message['role']}: {message['content']}" for message in messages
    )
