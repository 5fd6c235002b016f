"""Rubrics: the prompt that asks a language model to judge a completion, and the score in its answer.

The judge at an address (`rewards.judging.reward`) and the one in our own engine (`pipeline.judging.self_judge`) share
them. An answer gives a score only in the form that the rubric sets; any other answer is no score, never a low one.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from rewards.types import Task, Verdict

Vote = tuple[float, str]
"""A score and the answer that gives it."""

TRIES = 3
"""Answers that a judge may give for one vote before it counts as failed."""

_PLACEHOLDER = re.compile(r"\{(prompt|conversation|completion|truth)\}")
_MARK = re.compile(r"\[\[\s*([+-]?\d+(?:\.\d+)?)\s*\]\]")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_FORM_TEXTS = {"mark": "[[", "json": '"score"'}


class NoScore(Exception):
    """Raised for an answer without a score in the rubric's form. The message gives the reason and an excerpt."""


class Rubric(Settings):
    """The prompt for a judge, the form of its answers, and the number of votes."""

    rubric: str | None = None
    """The judge's prompt. {completion} stands for the completion, {prompt} for the last message, {conversation} for all
    messages before the completion, {truth} for the task's truth. Set either `rubric` or `rubric_file`."""
    rubric_file: str | None = None
    """UTF-8 file with the prompt."""
    form: Literal["mark", "json"] = "mark"
    """The form of an answer, which the rubric must ask for. `mark`: prose with exactly one [[7]]. `json`: only an
    object with a number "score", with or without a code fence. A thought up to </think> is ignored."""
    lowest: float = 1.0
    """Lowest score. An answer below it is no score."""
    highest: float = 10.0
    """Highest score. An answer above it is no score."""
    votes: int = Field(default=1, ge=1)
    """Votes on each completion; its score is their mean."""

    @model_validator(mode="after")
    def _sound(self) -> "Rubric":
        if (self.rubric is None) == (self.rubric_file is None):
            raise ValueError("set exactly one of 'rubric' and 'rubric_file'")
        if self.rubric_file is not None and not Path(self.rubric_file).expanduser().is_file():
            raise ValueError(f"rubric_file='{self.rubric_file}' is no file (looked from {Path.cwd()})")
        if "{completion}" not in self.text:
            raise ValueError("the rubric has no {completion}, so the judge would not see the completion; add it")
        if _FORM_TEXTS[self.form] not in self.text:
            raise ValueError(
                f"form='{self.form}' needs a rubric that asks for it; add {_FORM_TEXTS[self.form]} to the rubric"
            )
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} must be below highest={self.highest:g}")
        return self

    @cached_property
    def text(self) -> str:
        """The prompt with its placeholders."""
        if self.rubric is not None:
            return self.rubric
        return Path(str(self.rubric_file)).expanduser().read_text(encoding="utf-8")

    def check(self, task: Task) -> None:
        """Raises ValueError where the rubric has {truth} and the task none."""
        if "{truth}" in self.text and task.truth is None:
            raise ValueError("the rubric shows {truth}, the task has none; set prompts.truth")

    def question(self, task: Task, completion: str) -> list[dict[str, str]]:
        """The conversation that asks the judge for a score, as messages `{role, content}`."""
        values = {
            "prompt": task.prompt,
            "conversation": "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in task.conversation),
            "completion": completion,
            "truth": task.truth if isinstance(task.truth, str) else json.dumps(task.truth, ensure_ascii=False),
        }
        # One pass for all placeholders, so that text in braces in a completion stays text.
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)
        return [{"role": "user", "content": well_formed(text)}]

    def read(self, answer: str) -> float:
        """The score in an answer. Raises NoScore for none, several, or one out of range.

        Example:
            Rubric(rubric="Rate {completion} like [[7]]").read("Short and right: [[9]]") == 9.0
        """
        text = answer.rpartition("</think>")[2].strip()
        score = _marked_score(text) if self.form == "mark" else _json_score(text)
        if not self.lowest <= score <= self.highest:
            raise NoScore(f"{score:g} is not between {self.lowest:g} and {self.highest:g}")
        return score


def well_formed(text: str) -> str:
    """`text` with U+FFFD in the place of lone surrogates, which UTF-8 can't encode."""
    return _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def averaged(votes: Sequence[Vote]) -> Verdict:
    """The mean of the votes, with the first answer as the detail."""
    return Verdict(sum(score for score, _ in votes) / len(votes), detail=excerpt(votes[0][1]))


def excerpt(text: str) -> str:
    """An answer for a message: short and on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}")


def _marked_score(text: str) -> float:
    marks = _MARK.findall(text)
    if len(marks) != 1:
        raise NoScore(f"{len(marks) or 'no'} marks like [[7]] in {excerpt(text)}")
    return float(marks[0])


def _json_score(text: str) -> float:
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise NoScore(f"not JSON ({error}): {excerpt(text)}") from error
    score = value.get("score") if isinstance(value, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise NoScore(f'no number "score" in {excerpt(text)}')
    return float(score)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Raises ValueError for a key that stands there twice, such as a second score."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
