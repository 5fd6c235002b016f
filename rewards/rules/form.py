"""Rewards for the form of a completion: its parts, its length, its repetitions.

All of them take time linear in the text and depend on the text alone.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from rewards.thinking import unmentioned
from rewards.types import Task, Verdict

# Chinese and Japanese have no spaces between words, so each character counts as one.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class ThinkFormatReward(Settings):
    """1.0 for a thought between its tags and an answer after it, else 0.0 (the format reward of DeepSeek-R1,
    arXiv:2501.12948, section 2.2).

    Each tag appears exactly once and in order, thought and answer are not blank, and only white space comes before the
    thought. A tag in code, between backticks, or in the middle of a sentence is text (`rewards.thinking`). The
    verdict's outcome names the fault.
    """

    think: str = Field(default="think", min_length=1)
    """Name of the thought's tags: `think` stands for <think> and </think>."""
    answer: str | None = Field(default=None, min_length=1)
    """Name of tags around the answer, such as `answer`; only the thought may stand outside of them. None takes all text
    after the thought as the answer."""
    opened: bool | None = None
    """True where the chat template opens the thought, as DeepSeek-R1's does, so that completions must not. None accepts
    both, with the outcome "in form, opened by the prompt" for a completion without <think>. Set false where the
    template opens none, since None would accept completions that leave <think> out."""

    def score(self, task: Task, completion: str) -> Verdict:
        names = "|".join(re.escape(name) for name in (self.think, self.answer) if name)
        completion = unmentioned(completion, re.compile(f"<(/?)(?:{names})>"))
        fault = self._fault(completion, opened=bool(self.opened))
        if fault is None:
            return Verdict(1.0, outcome="in form")
        if self.opened is None and fault == f"no <{self.think}>" and self._fault(completion, opened=True) is None:
            return Verdict(1.0, outcome="in form, opened by the prompt")
        return Verdict(0.0, outcome=fault)

    def _fault(self, completion: str, *, opened: bool) -> str | None:
        opening, tags = f"<{self.think}>", [f"</{self.think}>"]
        if self.answer is not None:
            tags += [f"<{self.answer}>", f"</{self.answer}>"]
        if not opened:
            tags = [opening, *tags]
        elif opening in completion:
            return f"{opening} more than once"
        parts, rest = [], completion
        for tag in tags:
            count = completion.count(tag)
            if count != 1:
                return f"no {tag}" if count == 0 else f"{tag} more than once"
            part, separator, rest = rest.partition(tag)
            if not separator:
                return f"{tag} out of order"
            parts.append(part)
        parts.append(rest)
        # The text between the tags is a named part, or blank.
        names = ["thought", "answer"] if self.answer is None else ["thought", None, "answer", None]
        for part, name in zip(parts, names if opened else [None, *names], strict=True):
            if bool(part.strip()) != (name is not None):
                return "text outside of the tags" if name is None else f"no {name}"
        return None


class LengthReward(Settings):
    """1.0 for a length between `shortest` and `longest`, falling linearly to 0.0 over `falloff` on both sides.

    A reward sees no tokens. To punish completions near the token limit, where they are cut off, set
    `overlong.shaping_tokens` (`pipeline.grpo.mix.shape_overlong`).
    """

    unit: Literal["words", "characters"] = "words"
    """Unit of length. White space separates words; each Chinese or Japanese character is one."""
    shortest: int = Field(default=0, ge=0)
    """Shortest length with full marks."""
    longest: int = Field(ge=1)
    """Longest length with full marks."""
    falloff: int = Field(default=0, ge=0)
    """Distance outside of this range at which the score reaches 0.0. 0 is at once."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "LengthReward":
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest} must not be more than longest={self.longest}")
        return self

    def score(self, task: Task, completion: str) -> float:
        length = len(completion) if self.unit == "characters" else len(_WORDS.findall(completion))
        outside = max(self.shortest - length, length - self.longest, 0)
        return max(0.0, 1 - outside / self.falloff) if outside and self.falloff else float(not outside)


class RepetitionReward(Settings):
    """The share of n-grams that repeat no earlier one: 1.0 where all differ, near 0.0 for one phrase over and over.

    This is 1 minus Open-R1's repetition penalty at its full strength of 1 (after Yeo et al., arXiv:2502.03373, appendix
    C.2, who punish each repeating token). A completion shorter than one n-gram scores 1.0.
    """

    ngram: int = Field(default=10, ge=1, le=50)
    """Words in an n-gram, case ignored; each Chinese or Japanese character is one. Short n-grams repeat in any text:
    over 2,640 solutions of GSM8K problems the mean score is 0.94 with 3 (Open-R1's default) and 0.998 with 10, while
    solutions that go round in circles fall to 0.3 with either."""

    def score(self, task: Task, completion: str) -> float:
        words = _WORDS.findall(completion.lower())
        total = len(words) - self.ngram + 1
        if total < 1:
            return 1.0
        return len(set(zip(*(words[start:] for start in range(self.ngram)), strict=False))) / total
