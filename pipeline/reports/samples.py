"""What was said: samples to read, before and after, best and worst, and what came of judging them."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reports.files import ROLLOUTS, read_json_lines
from pipeline.reports.page import Inside, Markup, folded, section, table, tag
from pipeline.reports.shapes import bars

FILES_READ = 100
"""Steps whose samples are read; of more steps, so many evenly spread, the first and the last among them."""
SHOWN = 3
"""Prompts shown before and after, and samples shown as best and worst."""
CHARACTERS = 4000
"""Longest text shown of a sample."""
REASONS = 12

Record = dict[str, Any]
KINDS = {"timeout": "kbad", "infra error": "kbad", "abstain": "kidle"}


@dataclass(frozen=True, slots=True)
class Side:
    """What was answered to a prompt at one time: when, one answer, its score (None where it was not judged), and a
    word on the verdict."""

    when: str
    answer: str
    score: float | None
    judged: str


def samples(folder: Path) -> list[Markup]:
    """The sections on a stage's kept rollouts: before and after, best and worst, and what was not judged and why."""
    files = _spread(sorted((folder / ROLLOUTS).glob("step-*.jsonl")))
    steps = {int(file.stem.removeprefix("step-")): read_json_lines(file) for file in files}
    steps = {step: records for step, records in steps.items() if records}
    if not steps:
        return []
    last = max(steps)
    return [
        section("Before and after", *_before_and_after(steps)),
        section(f"Best and worst of step {last}", *_best_and_worst(steps[last])),
        section("What came of judging", *_outcomes([one for records in steps.values() for one in records])),
    ]


def before_and_after(question: str, sides: Sequence[Side]) -> Markup:
    """One prompt and what was answered to it at several times, side by side."""
    return tag(
        "div",
        tag("div", _elided(question), class_="said asked long"),
        tag("div", (_side(side) for side in sides), class_="sides"),
        class_="sample",
    )


def answers(file: Path) -> dict[str, Record]:
    """By row the records of an evaluation's greedy answers."""
    records = read_json_lines(file)
    return {
        f"{one['row']} {one['prompt']}": one
        for one in records
        if one.get("mode") == "greedy" and isinstance(one.get("prompt"), str)
    }


def compared(before: Mapping[str, Record], after: Mapping[str, Record], names: tuple[str, str]) -> list[Inside]:
    """Greedy answers of two evaluations to the same prompts: how many changed for better and worse, and the first
    ones that did."""
    shared = [key for key in before if key in after]
    judged = [key for key in shared if before[key]["score"] is not None and after[key]["score"] is not None]
    change = {key: after[key]["score"] - before[key]["score"] for key in judged}
    better, worse = ([key for key in judged if sign * change[key] > 0] for sign in (1, -1))
    if not judged:
        return []
    said = (
        f"Of {len(judged)} greedy answers to the same prompts, {len(better)} scored higher and {len(worse)} lower in "
        f"{names[1]} than in {names[0]}. The first of each, and of those that stayed the same:"
    )
    same = [key for key in judged if not change[key]]
    shown = [*better[:SHOWN], *worse[:1], *same[:1]]
    cards = [
        before_and_after(
            before[key]["prompt"],
            [
                Side(name, one[key]["completion"], one[key]["score"], _said_of(one[key]))
                for name, one in zip(names, (before, after), strict=True)
            ],
        )
        for key in shown
    ]
    return [tag("p", said, class_="about"), tag("div", cards, class_="samples")]


def _before_and_after(steps: Mapping[int, list[Record]]) -> list[Inside]:
    """Prompts that came up at several steps, the first and last time; if none did, the first step's and the last's."""
    seen: defaultdict[str, list[int]] = defaultdict(list)
    for step, records in sorted(steps.items()):
        for prompt in dict.fromkeys(one["prompt"] for one in records):
            seen[prompt].append(step)
    again = sorted((at for at in seen.items() if len(at[1]) > 1), key=lambda at: at[1][0] - at[1][-1])[:SHOWN]
    if again:
        about = "Prompts that came up more than once, furthest apart: an answer of the first time and one of the last."
        cards = [
            before_and_after(prompt, [_group_side(steps, step, prompt) for step in (times[0], times[-1])])
            for prompt, times in again
        ]
    else:
        about = "No prompt was kept twice: here are answers to others, of the first step and of the last."
        ends = [(step, list(dict.fromkeys(one["prompt"] for one in steps[step]))) for step in (min(steps), max(steps))]
        cards = [
            before_and_after(prompt, [_group_side(steps, step, prompt)])
            for step, prompts in ends
            for prompt in prompts[:SHOWN]
        ]
    return [tag("p", about, class_="about"), tag("div", cards, class_="samples")]


def _group_side(steps: Mapping[int, list[Record]], step: int, prompt: str) -> Side:
    """The answer in the middle of a prompt's group, and the mean of the group."""
    group = [one for one in steps[step] if one["prompt"] == prompt]
    judged = sorted((one for one in group if one["reward"] is not None), key=lambda one: one["reward"])
    if not judged:
        return Side(f"step {step}", group[0]["completion"], None, _verdicts(group[0]))
    middle = judged[len(judged) // 2]
    mean = math.fsum(one["reward"] for one in judged) / len(judged)
    said = f"{_verdicts(middle)}; mean of {len(judged)}: {mean:.3g}"
    return Side(f"step {step}", middle["completion"], middle["reward"], said)


def _best_and_worst(records: Sequence[Record]) -> Iterator[Markup]:
    rising = sorted((one for one in records if one["reward"] is not None), key=lambda one: one["reward"])
    best, worst = _one_a_prompt(rising[::-1]), _one_a_prompt(rising)
    unjudged = _one_a_prompt([one for one in records if one["reward"] is None])
    for title, chosen in (("Best", best), ("Worst", worst), ("Left out", unjudged)):
        if chosen:
            yield tag("h3", title)
            yield tag("div", map(_card, chosen), class_="samples")


def _one_a_prompt(records: Sequence[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for one in records:
        first.setdefault(one["prompt"], one)
    return list(first.values())[:SHOWN]


def _card(one: Record) -> Markup:
    side = Side(f"ended by {one['finish_reason']}", one["completion"], one["reward"], _verdicts(one))
    return before_and_after(one["prompt"], [side])


def _side(side: Side) -> Markup:
    score = "not judged" if side.score is None else f"{side.score:.3g}"
    return tag(
        "div",
        tag("div", side.when, " · ", tag("b", score), class_="who"),
        tag("div", _elided(side.answer) or tag("i", "nothing"), class_="said long"),
        tag("div", side.judged, class_="judged"),
        class_="side",
    )


def _outcomes(records: Sequence[Record]) -> Iterator[Markup]:
    """Verdicts by reward as bars, and the words of those that gave no score."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[tuple[str, str, str]] = Counter()
    for one in records:
        for name, verdict in one["verdicts"].items():
            status = verdict["status"].replace("_", " ")
            counts[name][verdict["outcome"] or "judged" if verdict["status"] == "ok" else status] += 1
            if verdict["status"] != "ok":
                reasons[(name, status, verdict["detail"] or "(no word)")] += 1
    if counts:
        yield tag("p", f"Verdicts on the {len(records)} samples kept of the steps read.", class_="about")
        yield bars({name: dict(each.most_common()) for name, each in counts.items()}, KINDS)
    if reasons:
        rows = [(*why, str(count)) for why, count in reasons.most_common(REASONS)]
        yield folded(
            f"Why {reasons.total()} verdicts gave no score",
            table(("reward", "status", "detail", "count"), rows, numbers=[3]),
            opened=True,
        )


def _verdicts(one: Record) -> str:
    """The verdicts of a rollout in a line."""
    return "; ".join(
        " ".join(
            part
            for part in (
                name,
                verdict["outcome"] or verdict["status"].replace("_", " "),
                "" if verdict["score"] is None else f"{verdict['score']:.3g}",
                f"({verdict['detail']})" if verdict["detail"] else "",
            )
            if part
        )
        for name, verdict in one["verdicts"].items()
    )


def _said_of(one: Record) -> str:
    """The verdict of an evaluation's record in a line."""
    truth = "" if one["truth"] is None else f"truth {json.dumps(one['truth'], ensure_ascii=False)[:200]}"
    return "; ".join(part for part in (one["outcome"] or one["status"], one["detail"], truth) if part)


def _spread(files: Sequence[Path]) -> list[Path]:
    if len(files) <= FILES_READ:
        return list(files)
    return [files[round(place * (len(files) - 1) / (FILES_READ - 1))] for place in range(FILES_READ)]


def _elided(raw: str) -> str:
    if len(raw) <= CHARACTERS:
        return raw
    half = CHARACTERS // 2
    return f"{raw[:half]}\n … {len(raw) - 2 * half} characters left out …\n{raw[-half:]}"
