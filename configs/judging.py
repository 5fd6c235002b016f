"""Judges that are language models: the prompt that asks for a verdict, and the form of the verdict."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings

_FORM_TEXTS = {"mark": "[[", "box": "\\boxed{", "json": '"score'}


class VerdictForm(Settings):
    """Form of a verdict: the place of its scores, and their range."""

    form: Literal["mark", "box", "json"] = "mark"
    """Place of the scores, which the judge's prompt must ask for. `mark`: prose with exactly one [[7]], or [[7, 3]] for
    two answers. `box`: the same with \\boxed{7, 3}. `json`: only an object with a number "score", or for several
    answers a list "scores", with or without a code fence. A thought up to </think> is ignored."""
    lowest: float = 1.0
    """Lowest score. A verdict with a lower one is none."""
    highest: float = 10.0
    """Highest score. A verdict with a higher one is none."""

    @model_validator(mode="after")
    def _has_a_range(self) -> "VerdictForm":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} must be below highest={self.highest:g}")
        return self


class RubricConfig(VerdictForm):
    """The prompt of a judge, the form of its verdicts, and the number of votes."""

    rubric: str | None = None
    """The judge's prompt. {completion} stands for the completion, or {answers} for several under headings such as
    [Answer 1]; {prompt} for the last message, {conversation} for all messages before the completion, {truth} for the
    task's truth, {rubric} for the row's own rubric. Set either `rubric` or `rubric_file`."""
    rubric_file: str | None = None
    """UTF-8 file with the prompt."""
    rubric_column: str = "rubric"
    """Column with the row's own rubric, a text or a list of criteria, which stands for {rubric}."""
    compare: int = Field(default=1, ge=1)
    """Answers that one prompt shows. 1 judges each by itself. More compares the answers of a group, in another order
    for each vote; their scores then compare within the group alone."""
    votes: int = Field(default=1, ge=1)
    """Votes on each completion; its score is their mean."""

    @model_validator(mode="after")
    def _sound(self) -> "RubricConfig":
        if (self.rubric is None) == (self.rubric_file is None):
            raise ValueError("set exactly one of 'rubric' and 'rubric_file'")
        if self.rubric_file is not None and not Path(self.rubric_file).expanduser().is_file():
            raise ValueError(f"rubric_file='{self.rubric_file}' is no file (looked from {Path.cwd()})")
        needed, other = ("{completion}", "{answers}") if self.compare == 1 else ("{answers}", "{completion}")
        if needed not in self.text:
            raise ValueError(f"the rubric has no {needed}, so the judge would see no answer; add it")
        if other in self.text:
            raise ValueError(f"the rubric shows {needed} with compare={self.compare}; remove {other}")
        if _FORM_TEXTS[self.form] not in self.text:
            raise ValueError(
                f"form='{self.form}' needs a rubric that asks for it; add {_FORM_TEXTS[self.form]} to the rubric"
            )
        if "{rubric}" not in self.text and self.rubric_column != "rubric":
            raise ValueError(
                f"rubric_column='{self.rubric_column}' has no effect: the rubric has no {{rubric}}; add it"
            )
        return self

    @cached_property
    def text(self) -> str:
        """The prompt with its placeholders."""
        if self.rubric is not None:
            return self.rubric
        return Path(str(self.rubric_file)).expanduser().read_text(encoding="utf-8")
