"""The form of a completion, whatever it says: its parts, its length, how often it repeats itself.

All of it is linear in the text and depends on nothing but the text.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from rewards.thinking import unmentioned
from rewards.types import Task, Verdict

# Chinese and Japanese are written without spaces: there a character is counted as a word.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class ThinkFormatReward(Settings):
    """1.0 for a thought between its tags with an answer behind it, else 0.0 (the format reward of DeepSeek-R1,
    arXiv:2501.12948, section 2.2).

    Each tag stands there exactly once and in order; thought and answer are not blank; nothing but white space is before
    the thought. A tag in code, between backticks, or in the middle of a sentence is text (`rewards.thinking`). The
    verdict's outcome says what is wrong.
    """

    think: str = Field(default="think", min_length=1)
    """Name of the thought's tags: `think` stands for <think> and </think>."""
    answer: str | None = Field(default=None, min_length=1)
    """Name of tags around the answer, such as `answer`, outside of which nothing may stand but the thought. None: the
    answer is all that follows the thought."""
    opened: bool | None = None
    """Whether the chat template already opens the thought, as DeepSeek-R1's does, so that no completion does. None
    accepts both, with the outcome "in form, opened by the prompt" for a completion without <think>. Set false where the
    template opens none: None would accept completions that leave <think> out."""

    def score(self, task: Task, completion: str) -> Verdict:
        """1.0 or 0.0; see the class."""
        names = "|".join(re.escape(name) for name in (self.think, self.answer) if name)
        completion = unmentioned(completion, re.compile(f"<(/?)(?:{names})>"))
        fault = self._fault(completion, opened=bool(self.opened))
        if fault is None:
            return Verdict(1.0, outcome="in form")
        if self.opened is None and fault == f"no <{self.think}>" and self._fault(completion, opened=True) is None:
            return Verdict(1.0, outcome="in form, opened by the prompt")
        return Verdict(0.0, outcome=fault)

    def _fault(self, completion: str, *, opened: bool) -> str | None:
        # What stands between the tags is by turns blank and not blank; an answer without tags follows at once.
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
            part, found, rest = rest.partition(tag)
            if not found:
                return f"{tag} out of order"
            parts.append(part)
        parts.append(rest)
        wanted = ["thought", "answer"] if self.answer is None else ["thought", None, "answer", None]
        for part, name in zip(parts, wanted if opened else [None, *wanted], strict=True):
            if bool(part.strip()) != (name is not None):
                return "text outside of the tags" if name is None else f"no {name}"
        return None


class LengthReward(Settings):
    """1.0 for a length between `shortest` and `longest`, falling linearly to 0.0 over `falloff` on both sides.

    A reward sees text only. To punish what nears the limit in tokens, where a completion is cut off, set
    `overlong.shaping_tokens` instead: `pipeline.grpo.mix.shape_overlong` counts the tokens that were sampled.
    """

    unit: Literal["words", "characters"] = "words"
    """What is counted. Words stand between white space; of Chinese and Japanese every character is one."""
    shortest: int = Field(default=0, ge=0)
    """Length up to which a completion is too short."""
    longest: int = Field(ge=1)
    """Length beyond which a completion is too long."""
    falloff: int = Field(default=0, ge=0)
    """How far outside a completion earns nothing any more. 0: at once."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "LengthReward":
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest} must not be more than longest={self.longest}")
        return self

    def score(self, task: Task, completion: str) -> float:
        """Between 0.0 and 1.0; see the class."""
        length = len(completion) if self.unit == "characters" else len(_WORDS.findall(completion))
        outside = max(self.shortest - length, length - self.longest, 0)
        return max(0.0, 1 - outside / self.falloff) if outside and self.falloff else float(not outside)


class RepetitionReward(Settings):
    """The share of n-grams that are not repetitions: 1.0 where all differ, near 0.0 where one thing is said forever.

    It is 1 minus the share that repeats an earlier n-gram, which is what Open-R1's repetition penalty takes away at its
    full strength of 1 (after Yeo et al., arXiv:2502.03373, appendix C.2, who punish the repeating tokens one by one).
    A completion of less than one n-gram repeats nothing.
    """

    ngram: int = Field(default=10, ge=1, le=50)
    """Words in an n-gram, without regard to case; of Chinese and Japanese every character is one. Short ones repeat in
    any text: over 2,640 solutions of GSM8K problems the mean score is 0.94 with 3 (Open-R1's default) and 0.998 with
    10, while solutions that go round in circles fall to 0.3 with either."""

    def score(self, task: Task, completion: str) -> float:
        """Between 0.0 and 1.0; see the class."""
        words = _WORDS.findall(completion.lower())
        total = len(words) - self.ngram + 1
        if total < 1:
            return 1.0
        return len(set(zip(*(words[start:] for start in range(self.ngram)), strict=False))) / total
