"""A rubric: what a language model is asked about a completion, and what counts as its score.

The same for a judge behind an address (`rewards.judge`) and one in our own engine (`pipeline.judging.self_judge`). What
a judge says is a score only in the one form that was agreed on; anything else is no score, and never a low one.
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

Message = dict[str, str]
Vote = tuple[float, str]
"""A score, and the answer that gives it."""

TRIES = 3
"""How often a judge is asked for one vote whose answers are no scores."""

_PLACEHOLDER = re.compile(r"\{(prompt|conversation|completion|truth)\}")
_MARK = re.compile(r"\[\[\s*([+-]?\d+(?:\.\d+)?)\s*\]\]")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ASKED_BY = {"mark": "[[", "json": '"score"'}


class NoScore(Exception):
    """A judge's answer that is no score in the agreed form. The message says why and shows it."""


class Rubric(Settings):
    """What is asked, how the answer is read, and how often."""

    rubric: str | None = None
    """What the judge is asked. {completion} stands for what it judges, {prompt} for the last message, {conversation}
    for all up to the completion, {truth} for the task's truth. Exactly one of `rubric` and `rubric_file` is set."""
    rubric_file: str | None = None
    """The same in a UTF-8 file."""
    form: Literal["mark", "json"] = "mark"
    """The form of an answer. `mark`: prose with exactly one [[7]]. `json`: nothing but an object with a number "score",
    perhaps in a code fence. A thought up to </think> is not looked at. The rubric must ask for it."""
    lowest: float = 1.0
    """Lowest score there is; below it an answer is none."""
    highest: float = 10.0
    """Highest score there is."""
    votes: int = Field(default=1, ge=1)
    """How often each completion is judged; its score is the mean."""

    @model_validator(mode="after")
    def _sound(self) -> "Rubric":
        if (self.rubric is None) == (self.rubric_file is None):
            raise ValueError("set exactly one of 'rubric' and 'rubric_file'")
        if self.rubric_file is not None and not Path(self.rubric_file).expanduser().is_file():
            raise ValueError(f"rubric_file='{self.rubric_file}' is no file (looked from {Path.cwd()})")
        if "{completion}" not in self.text:
            raise ValueError("the rubric has no {completion}: the judge would not see what it judges")
        if _ASKED_BY[self.form] not in self.text:
            raise ValueError(
                f"form='{self.form}' wants a score that the rubric does not ask for: it has no {_ASKED_BY[self.form]}"
            )
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} must be below highest={self.highest:g}")
        return self

    @cached_property
    def text(self) -> str:
        """The rubric with its placeholders."""
        if self.rubric is not None:
            return self.rubric
        return Path(str(self.rubric_file)).expanduser().read_text(encoding="utf-8")

    def check(self, task: Task) -> None:
        """Raises ValueError where the rubric shows a truth that `task` does not have."""
        if "{truth}" in self.text and task.truth is None:
            raise ValueError("the rubric shows {truth}, the task has none; set prompts.truth")

    def question(self, task: Task, completion: str) -> list[Message]:
        """The conversation that asks for a score."""
        values = {
            "prompt": task.prompt,
            "conversation": "\n\n".join(f"[{said['role']}]\n{said['content']}" for said in task.conversation),
            "completion": completion,
            "truth": task.truth if isinstance(task.truth, str) else json.dumps(task.truth, ensure_ascii=False),
        }
        # In one pass: what a completion spells in braces is no placeholder.
        text = _PLACEHOLDER.sub(lambda found: values[found[1]], self.text)
        return [{"role": "user", "content": well_formed(text)}]

    def read(self, answer: str) -> float:
        """The score that an answer gives. Raises NoScore where it gives none, several, or one out of range."""
        said = answer.rpartition("</think>")[2].strip()
        score = _mark(said) if self.form == "mark" else _field(said)
        if not self.lowest <= score <= self.highest:
            raise NoScore(f"{score:g} is not between {self.lowest:g} and {self.highest:g}")
        return score


def well_formed(text: str) -> str:
    """`text` with a mark in the place of every half of a character, for which UTF-8 has no bytes."""
    return _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def averaged(votes: Sequence[Vote]) -> Verdict:
    """The mean of the votes, with the first answer to read."""
    return Verdict(sum(score for score, _ in votes) / len(votes), detail=excerpt(votes[0][1]))


def excerpt(text: str) -> str:
    """A judge's words for a message: short, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}")


def _mark(said: str) -> float:
    marks = _MARK.findall(said)
    if len(marks) != 1:
        raise NoScore(f"{len(marks) or 'no'} marks like [[7]] in {excerpt(said)}")
    return float(marks[0])


def _field(said: str) -> float:
    fenced = _FENCE.fullmatch(said)
    try:
        value = json.loads(fenced[1] if fenced else said, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise NoScore(f"not JSON ({error}): {excerpt(said)}") from error
    score = value.get("score") if isinstance(value, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise NoScore(f'no number "score" in {excerpt(said)}')
    return float(score)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two scores none is the judge's."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
