"""What stages come to: figures with their intervals, gates' decisions, reward models' calibration, comparisons made."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.gate import HoldRule, ImproveRule, Rule, ThresholdRule
from pipeline.disk.recorded import EVALUATION
from pipeline.gates.decision import Decision, describe_rule, describe_ruling, read_decision
from pipeline.gates.rules import Ruling, lower_is_better
from pipeline.reports.files import read_json_lines
from pipeline.reports.page import Inside, Markup, folded, pill, section, table, tag
from pipeline.reports.samples import Side, answers, before_and_after, compared
from pipeline.reports.shapes import Interval, bars, forest, reliability

DATA = "data"

Figures = Mapping[str, float]

KINDS = {"holds": "good", "fails": "bad", "undecided": "idle"}
VERDICTS = {"promote": "good", "stop": "bad", "roll_back": "bad", "ask": "busy"}
PAIRS_SHOWN = 4
GATE = (
    "Dots are figures, lines their intervals, dashes the bounds: a rule holds or fails where its interval lies on "
    "one side, and is undecided where the interval reaches across."
)


def evaluation(figures: Figures) -> Markup:
    """The figures of an evaluation, suite by suite."""
    suites: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in figures.items():
        suite, _, name = key.partition("/")
        suites[suite][name] = value
    return section(
        "Figures",
        (tag("div", tag("h3", suite), _with_intervals(suite, of_suite)) for suite, of_suite in suites.items()),
    )


def reward_model(folder: Path, figures: Figures) -> Markup:
    """Accuracy with its interval, overall and per source, and calibration, on each held-out set."""
    held_out: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in figures.items():
        if found := re.fullmatch(r"eval/([^/]+)/(.+)", key):
            held_out[found[1]][found[2]] = value
    parts: list[Markup] = []
    for name, of_set in held_out.items():
        bins = read_json_lines(folder / EVALUATION / f"{name}.reliability.jsonl")
        points = [(each["confidence"], each["accuracy"], each["pairs"]) for each in bins if each["pairs"]]
        drawn = reliability("Calibration: how sure, and how often right", points) if points else ""
        parts.append(tag("div", tag("h3", name), _with_intervals(name, of_set, drawn)))
    return section("Held-out comparisons", parts)


def gate(folder: Path) -> list[Markup]:
    """The decision, the intervals it rests on, and answers of parent and candidate beside each other."""
    decision = read_decision(folder)
    if decision is None:
        return []
    said = tag("p", verdict(decision), f" Decided by {'the rules' if decision.decided_by == 'rules' else 'a person'}.")
    best = [tag("h3", "On the best checkpoint that was kept"), _rulings(decision.best)] if decision.best else ""
    plots = tag("div", decision_plots(decision), class_="charts")
    return [
        section("Decision", said, plots, _rulings(decision.rulings), best, about=GATE),
        *beside(folder / "parent", folder / "candidate", ("the parent", "the candidate")),
    ]


def decision_plots(decision: Decision) -> list[Markup]:
    """The interval that each rule of a gate rests on: of the difference from the parent, or of a figure."""
    return [
        forest(describe_rule(each.rule), [_interval(each)], zero=each.difference is not None)
        for each in decision.rulings
    ]


def beside(before: Path, after: Path, names: tuple[str, str]) -> Iterator[Markup]:
    """Per suite that both evaluations ran, their answers to the same prompts."""
    for file in sorted(before.glob("*.jsonl")):
        other = after / file.name
        if other.is_file() and not file.name.endswith(".bad_rows.jsonl"):
            yield section(f"Before and after: {file.stem}", *compared(answers(file), answers(other), names))


def verdict(decision: Decision) -> Markup:
    """A gate's verdict in a word."""
    return pill(decision.action.replace("_", " "), VERDICTS[decision.action])


def comparisons(folder: Path, figures: Figures) -> list[Markup]:
    """What a data stage kept and dropped and why, and rows of what it made."""
    counted = _fates(figures)
    drawn = bars(counted, {"kept": "s0", "in pairs": "s0", "dropped": "kidle"}) if counted else ""
    return [
        section("Kept and dropped", drawn, plain_figures(figures)),
        section("Rows", tag("div", _rows(folder / DATA), class_="samples")),
    ]


def _fates(figures: Figures) -> dict[str, dict[str, int]]:
    """By what it was of, how much was kept and how much dropped for which reason."""
    fates: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for key, value in figures.items():
        if found := re.fullmatch(r"(?:(.+)/)?dropped/(.+)", key):
            of = f"{found[1]}/" if found[1] else ""
            fate = fates[f"Answers of {found[1]}" if of else "Comparisons"]
            fate["kept"] = round(figures[f"{of}kept"])
            fate[found[2].replace("_", " ")] = round(value)
        elif found := re.fullmatch(r"(source|domain)/(.+)/given", key):
            kept = round(figures[f"{found[1]}/{found[2]}/kept"])
            fates[f"Comparisons of {found[1]} {found[2]}"] = {"kept": kept, "dropped": round(value) - kept}
        elif found := re.fullmatch(r"sampled/(.+)/without_pair/(.+)", key):
            source = f"sampled/{found[1]}"
            fate = fates[f"Prompts of {found[1]}"]
            fate["in pairs"] = round(figures[f"{source}/prompts"] - figures[f"{source}/without_pair"])
            fate[found[2].replace("_", " ")] = round(value)
    return {
        of: {part: count for part, count in fate.items() if count} for of, fate in fates.items() if any(fate.values())
    }


def plain_figures(figures: Figures) -> Markup:
    """All figures in a table that is folded away."""
    if not figures:
        return Markup()
    rows = [(key, f"{value:.6g}") for key, value in figures.items()]
    return folded("All figures", table(("figure", "value"), rows, numbers=[1]))


def _with_intervals(name: str, figures: Figures, *drawn: Inside) -> list[Inside]:
    """Figures that have an interval as a forest, and all of them in a table."""
    intervals = [
        Interval(key, value, figures[f"{key}_low"], figures[f"{key}_high"], None, "busy", f"{value:.3g}")
        for key, value in figures.items()
        if f"{key}_low" in figures
    ]
    plots = [forest("95 % intervals", intervals, zero=False)] if intervals else []
    rows = [
        (key, f"{value:.4g}", f"{figures[f'{key}_low']:.4g} to {figures[f'{key}_high']:.4g}")
        if f"{key}_low" in figures
        else (key, f"{value:.4g}", "")
        for key, value in figures.items()
        if not key.endswith(("_low", "_high"))
    ]
    head = ("figure", name, "95 % interval")
    return [tag("div", [*plots, *drawn], class_="charts"), table(head, rows, numbers=[1])]


def _interval(ruling: Ruling) -> Interval:
    value = ruling.candidate if ruling.difference is None else ruling.difference
    note = f"{ruling.candidate:.3g}" + ("" if ruling.parent is None else f" from {ruling.parent:.3g}")
    rule, kind = ruling.rule, KINDS[ruling.outcome]
    return Interval(ruling.outcome, value, ruling.low, ruling.high, _bound(rule), kind, note)


def _bound(rule: Rule) -> float | None:
    """Where the interval must lie beyond, on its own axis."""
    sign = -1 if lower_is_better(rule.figure) else 1
    match rule:
        case ImproveRule():
            return sign * rule.margin
        case HoldRule():
            return -sign * rule.tolerance
        case ThresholdRule():
            return rule.at_most if rule.at_least is None else rule.at_least


def _rulings(rulings: Sequence[Ruling]) -> Markup:
    rows = [
        [
            describe_rule(ruling.rule),
            _number(ruling.parent),
            _number(ruling.candidate),
            _number(ruling.difference),
            f"{ruling.low:.3g} to {ruling.high:.3g}",
            ruling.samples,
            tag("span", describe_ruling(ruling), class_=KINDS[ruling.outcome]),
        ]
        for ruling in rulings
    ]
    head = ("rule", "parent", "candidate", "difference", "interval", "items", "outcome")
    return table(head, rows, numbers=[1, 2, 3, 5])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _rows(folder: Path) -> list[Markup]:
    """Some rows of a data set that a stage made: comparisons with best and worst answer, or conversations."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    import datasets  # a second or two, for these stages only

    loaded = datasets.load_from_disk(str(folder))
    assert isinstance(loaded, datasets.DatasetDict)
    split = loaded["train"]
    places = sorted({place * len(split) // PAIRS_SHOWN for place in range(PAIRS_SHOWN)}) if len(split) else []
    return [_row(split[place]) for place in places]


def _row(row: Mapping[str, Any]) -> Markup:
    messages, domain = row["messages"], f"{row['source']} · {row['domain']}"
    if "answers" not in row:
        *asked, said = messages
        return before_and_after(_conversation(asked), [Side(domain, said["content"], row["score"], "")])
    places = (0, -1) if len(row["answers"]) > 1 else (0,)
    sides = [
        Side(
            f"{'best' if place == 0 else 'worst'} of {len(row['answers'])} · {domain}",
            row["answers"][place],
            row["scores"][place] if row["scores"] else None,
            "",
        )
        for place in places
    ]
    return before_and_after(_conversation(messages), sides)


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(
        message["content"] if len(messages) == 1 else f"{message['role']}: {message['content']}" for message in messages
    )
