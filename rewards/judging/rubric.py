"""Rubrics: the prompt that asks a language model to judge completions, and the scores in its answer, the verdict.

The judge at an address (`rewards.judging.reward`), the one in our own engine (`pipeline.judging.self_judge`), and the
training and evaluation of judges (`pipeline.data.judging`) share them. An answer gives scores only in the form that the
rubric sets; any other answer is no verdict, never a low score.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from configs.judging import RubricConfig, VerdictForm
from rewards.types import Task

Vote = tuple[list[float], str]
"""The scores of a verdict, in the order in which it saw the answers, and its text."""

TRIES = 3
"""Answers that a judge may give for one vote before it counts as failed."""

_PLACEHOLDER = re.compile(r"\{(prompt|conversation|completion|answers|truth|rubric)\}")
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_NUMBERS = rf"\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*"
_MARKS = {"mark": re.compile(rf"\[\[{_NUMBERS}\]\]"), "box": re.compile(rf"\\boxed\{{{_NUMBERS}\}}")}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class NoScore(Exception):
    """Raised for an answer without scores in the rubric's form. The message gives the reason and an excerpt."""


class Rubric(RubricConfig):
    """The prompt for a judge, the form of its answers, and the number of votes."""

    @property
    def listwise(self) -> bool:
        """True where the completions of a group are compared with each other."""
        return self.compare > 1

    def check(self, task: Task) -> None:
        """Raises ValueError where the rubric shows {truth} or {rubric} and the task has none."""
        if "{truth}" in self.text and task.truth is None:
            raise ValueError("the rubric shows {truth}, the task has none; set prompts.truth")
        if "{rubric}" in self.text and not task.metadata.get(self.rubric_column):
            raise ValueError(f"the rubric shows {{rubric}}, the row has no column '{self.rubric_column}'; add it")

    def question(self, task: Task, *completions: str) -> list[dict[str, str]]:
        """The conversation that asks for a verdict on one completion, or on several in this order."""
        headed = [f"[Answer {number}]\n{text}" for number, text in enumerate(completions, start=1)]
        values = {
            "prompt": task.prompt,
            "conversation": "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in task.conversation),
            "completion": completions[0],
            "answers": "\n\n".join(headed),
            "truth": task.truth if isinstance(task.truth, str) else json.dumps(task.truth, ensure_ascii=False),
            "rubric": _criteria(task.metadata.get(self.rubric_column)),
        }
        # One pass for all placeholders, so that text in braces in a completion stays text.
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)
        return [{"role": "user", "content": well_formed(text)}]

    def read(self, answer: str) -> float:
        """The score in an answer on one completion. Raises NoScore for none, several, or one out of range.

        Example:
            Rubric(rubric="Rate {completion} like [[7]]").read("Short and right: [[9]]") == 9.0
        """
        return read_verdict(answer, 1, self)[0]


def read_verdict(answer: str, count: int, form: VerdictForm) -> list[float]:
    """The `count` scores of a verdict, in the order of the answers that it judges.

    Raises NoScore unless the verdict gives them once, in its form, and all in range.

    Example:
        read_verdict("The first adds wrongly. [[2, 9]]", 2, VerdictForm()) == [2.0, 9.0]
    """
    text = answer.rpartition("</think>")[2].strip()
    scores = _json_scores(text, count) if form.form == "json" else _marked_scores(text, form.form)
    if len(scores) != count:
        raise NoScore(f"{len(scores)} scores for {count} answers in {excerpt(text)}")
    for score in scores:
        if not form.lowest <= score <= form.highest:
            raise NoScore(f"{score:g} is not between {form.lowest:g} and {form.highest:g}")
    return scores


def written_scores(scores: Sequence[float], form: VerdictForm) -> str:
    """The scores as a verdict of this form writes them; `read_verdict` reads them back."""
    if form.form == "json":
        return json.dumps({"score": scores[0]} if len(scores) == 1 else {"scores": list(scores)})
    numbers = ", ".join(f"{score:g}" for score in scores)
    return f"[[{numbers}]]" if form.form == "mark" else f"\\boxed{{{numbers}}}"


def well_formed(text: str) -> str:
    """`text` with U+FFFD in the place of lone surrogates, which UTF-8 can't encode."""
    return _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def excerpt(text: str) -> str:
    """An answer for a message: short and on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}")


def _criteria(rubric: Any) -> str:
    """A row's rubric as text: a list as numbered criteria, each a text or a JSON object."""
    if not isinstance(rubric, list):
        return str(rubric or "")
    texts = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in rubric]
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))


def _marked_scores(text: str, form: str) -> list[float]:
    marks = _MARKS[form].findall(text)
    if len(marks) != 1:
        example = "[[7]]" if form == "mark" else "\\boxed{7}"
        raise NoScore(f"{len(marks) or 'no'} marks like {example} in {excerpt(text)}")
    return [float(number) for number in marks[0].split(",")]


def _json_scores(text: str, count: int) -> list[float]:
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise NoScore(f"not JSON ({error}): {excerpt(text)}") from error
    key = "score" if count == 1 else "scores"
    found: Any = value.get(key) if isinstance(value, dict) else None
    scores: Any = [found] if count == 1 else found
    if not isinstance(scores, list) or not all(map(_is_number, scores)):
        raise NoScore(f'no number "{key}" in {excerpt(text)}')
    return [float(score) for score in scores]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Raises ValueError for a key that stands there twice, such as a second score."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
