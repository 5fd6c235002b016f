"""Samples for people to read: rollouts of a stage, and greedy answers of two evaluations side by side."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.reports.files import ROLLOUTS, read_json_lines

_FILES_READ = 100
_CARDS = 3
"""Prompts shown in each group of cards."""
_FAILURES = 12

SampleRecord = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CardAnswer:
    """One answer to a prompt. heading: the step or model that gave it. score: None where it was not judged."""

    heading: str
    text: str
    score: float | None
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A prompt with one or more answers."""

    prompt: str
    answers: Sequence[CardAnswer]


def read_rollouts(folder: Path) -> dict[int, list[SampleRecord]]:
    """Samples in a stage's `rollouts/` by step, of at most 100 steps evenly spread from the first to the last."""
    files = list(rollout_files(folder).items())
    stride = max((len(files) - 1) / (_FILES_READ - 1), 1)
    files = [files[round(number * stride)] for number in range(min(len(files), _FILES_READ))]
    steps = {step: read_json_lines(file) for step, file in files}
    return {step: records for step, records in steps.items() if records}


def rollout_files(folder: Path) -> dict[int, Path]:
    """The files in a stage's `rollouts/` by step, rising."""
    files = {int(file.stem.removeprefix("step-")): file for file in (folder / ROLLOUTS).glob("step-*.jsonl")}
    return dict(sorted(files.items()))


def compare(before: Path, after: Path, names: tuple[str, str]) -> list[tuple[str, str, list[Card]]]:
    """Compare the greedy answers of two evaluations in every suite that both ran: its name, how many answers scored
    higher and lower, and the first of them."""
    comparisons: list[tuple[str, str, list[Card]]] = []
    for file in sorted(before.glob("*.jsonl")):
        both = [_greedy(file), _greedy(after / file.name)]
        changes = {key: both[1][key]["score"] - both[0][key]["score"] for key in both[0] if key in both[1]}
        if not changes:
            continue
        higher, lower, same = (
            [key for key, change in changes.items() if test(change)]
            for test in (lambda change: change > 0, lambda change: change < 0, lambda change: not change)
        )
        about = (
            f"Of {len(changes)} greedy answers to the same prompts, {len(higher)} scored higher and {len(lower)} lower "
            f"in {names[1]} than in {names[0]}. The first of each, and of those that scored the same:"
        )
        cards = [
            Card(both[0][key]["prompt"], [_greedy_answer(name, of[key]) for name, of in zip(names, both, strict=True)])
            for key in (*higher[:_CARDS], *lower[:1], *same[:1])
        ]
        comparisons.append((file.stem, about, cards))
    return comparisons


def _greedy(file: Path) -> dict[str, SampleRecord]:
    """The judged greedy answers in a file of an evaluation's records, by row and prompt."""
    return {
        f"{record['row']} {record['prompt']}": record
        for record in read_json_lines(file)
        if record.get("mode") == "greedy" and isinstance(record.get("prompt"), str) and record["score"] is not None
    }


def _greedy_answer(heading: str, record: SampleRecord) -> CardAnswer:
    truth = "" if record["truth"] is None else f"truth {json.dumps(record['truth'], ensure_ascii=False)[:200]}"
    parts = (record["outcome"] or record["status"], record["detail"], truth)
    return CardAnswer(heading, record["completion"], record["score"], "; ".join(part for part in parts if part))


def before_and_after(steps: Mapping[int, Sequence[SampleRecord]]) -> tuple[str, list[Card]]:
    """Prompts of several steps with an answer of the first and one of the last time; without such prompts, those of the
    first and of the last step."""
    occurrences: defaultdict[str, list[int]] = defaultdict(list)
    for step, records in sorted(steps.items()):
        for prompt in dict.fromkeys(record["prompt"] for record in records):
            occurrences[prompt].append(step)
    repeated = {prompt: at for prompt, at in occurrences.items() if len(at) > 1}
    if repeated:
        about = "Prompts that came up more than once, furthest apart: an answer of the first time and one of the last."
        furthest_apart = sorted(repeated, key=lambda prompt: repeated[prompt][0] - repeated[prompt][-1])[:_CARDS]
        answers_at = {prompt: [repeated[prompt][0], repeated[prompt][-1]] for prompt in furthest_apart}
    else:
        about = "No prompt was kept twice: these are answers to others, of the first step and of the last."
        answers_at = {prompt: at for prompt, at in occurrences.items() if at[0] in (min(steps), max(steps))}
    return about, [
        Card(prompt, [_median_answer(steps, step, prompt) for step in at]) for prompt, at in answers_at.items()
    ]


def _median_answer(steps: Mapping[int, Sequence[SampleRecord]], step: int, prompt: str) -> CardAnswer:
    """The answer in the middle of a prompt's group, with the mean of the group."""
    group = [record for record in steps[step] if record["prompt"] == prompt]
    ranking = _rising(group)
    if not ranking:
        return rollout_answer(f"step {step}", group[0])
    mean = fmean(record["reward"] for record in ranking)
    return rollout_answer(f"step {step}", ranking[len(ranking) // 2], f"; mean of {len(ranking)}: {mean:.3g}")


def extremes(records: Sequence[SampleRecord]) -> dict[str, list[Card]]:
    """Best, worst and left-out completions of a step, one of a prompt."""
    rising = _rising(records)
    left_out = [record for record in records if record["reward"] is None]
    cards: dict[str, list[Card]] = {}
    for title, group in {"Best": rising[::-1], "Worst": rising, "Left out": left_out}.items():
        first_of_prompt: dict[str, SampleRecord] = {}
        for record in group:
            first_of_prompt.setdefault(record["prompt"], record)
        cards[title] = [
            Card(prompt, [rollout_answer(f"ended by {record['finish_reason']}", record)])
            for prompt, record in list(first_of_prompt.items())[:_CARDS]
        ]
    return cards


def _rising(records: Iterable[SampleRecord]) -> list[SampleRecord]:
    return sorted((record for record in records if record["reward"] is not None), key=lambda record: record["reward"])


def rollout_answer(heading: str, record: SampleRecord, note: str = "") -> CardAnswer:
    """A completion of a rollout with its reward, the words of its verdicts, and a `note` behind them."""
    lines: list[str] = []
    for label, verdict in record["verdicts"].items():
        outcome = verdict["outcome"] or verdict["status"].replace("_", " ")
        score = "" if verdict["score"] is None else f"{verdict['score']:.3g}"
        detail = f"({verdict['detail']})" if verdict["detail"] else ""
        lines.append(" ".join(part for part in (label, outcome, score, detail) if part))
    return CardAnswer(heading, record["completion"], record["reward"], "; ".join(lines) + note)


def outcomes(records: Sequence[SampleRecord]) -> dict[str, Counter[str]]:
    """Counts of each reward's outcomes; a verdict without a score counts by its status."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for label, verdict in record["verdicts"].items():
            counts[label][verdict_word(verdict)] += 1
    return counts


def verdict_word(verdict: Mapping[str, Any]) -> str:
    """The outcome of a verdict; its status where it has no score."""
    return verdict["status"].replace("_", " ") if verdict["score"] is None else verdict["outcome"] or "judged"


def failures(records: Sequence[SampleRecord]) -> list[tuple[str, str, str, int]]:
    """Reward, status, detail and count of the most frequent verdicts without a score."""
    counts = Counter(
        (label, verdict["status"].replace("_", " "), verdict["detail"] or "(no detail)")
        for record in records
        for label, verdict in record["verdicts"].items()
        if verdict["score"] is None
    )
    return [(*failure, count) for failure, count in counts.most_common(_FAILURES)]
