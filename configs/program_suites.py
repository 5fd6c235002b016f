"""Suites of programs and of questions about programs, judged in the sandbox."""

from datetime import date
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.rewards import RewardSpec
from configs.suites import JudgedSuite, PromptedSuite, ShotSuite


class ProgramSuite(PromptedSuite, JudgedSuite):
    """Python programs, judged by their tests in the sandbox: pass@1 and pass@k."""

    reward: RewardSpec = Field(default_factory=lambda: RewardSpec(name="code"))
    """The sandboxed reward `code`; its `args` may set the limits."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward]


class HumanEvalSuite(ProgramSuite):
    """Functions to complete, in HumanEval's format (Chen et al., arXiv:2107.03374): `task_id`, `prompt`, `entry_point`,
    `test`."""

    type: Literal["human_eval"]
    """Selects this form of suite."""


class MBPPSuite(ProgramSuite, ShotSuite):
    """Functions to write, in MBPP's format (Austin et al., arXiv:2108.07732): `text`, `code`, `test_list`,
    `test_setup_code`; or as sanitized: `prompt`, `code`, `test_list`, `test_imports`. Examples are earlier turns."""

    type: Literal["mbpp"]
    """Selects this form of suite."""


class LiveCodeBenchSuite(ProgramSuite):
    """Contest problems in LiveCodeBench's format (Jain et al., arXiv:2403.07974): `question_content`, `starter_code`,
    `contest_date`, `public_test_cases`, `private_test_cases`, `metadata`. A window of dates leaves out the problems
    that a model may have seen in training."""

    type: Literal["livecodebench"]
    """Selects this form of suite."""
    since: str | None = None
    """First day of the window, as in "2023-09-01". None sets no bound."""
    until: str | None = None
    """Last day of the window."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Longest prompt in tokens. A longer one is a bad row; it is never truncated."""

    @field_validator("since", "until")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        try:
            return value and date.fromisoformat(value).isoformat()
        except ValueError as error:
            raise ValueError(f"'{value}' is no day; write it like 2023-09-01") from error

    @model_validator(mode="after")
    def _in_order(self) -> "LiveCodeBenchSuite":
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"since={self.since} is after until={self.until}")
        return self


class CruxEvalSuite(ProgramSuite, ShotSuite):
    """Questions about short functions in CRUXEval's format (Gu et al., arXiv:2401.03065): `code` defines f, and f of
    `input` is `output`. The prediction is compared by running it."""

    type: Literal["cruxeval"]
    """Selects this form of suite."""
    predicts: Literal["input", "output"]
    """`output`: the value of f for the row's input (CRUXEval-O). `input`: any input for the row's output (CRUXEval-I).
    """
    reasons: bool = True
    """Ask for reasoning before the prediction (CRUXEval-COT). Examples then show their column `thought`."""
    reward: RewardSpec = Field(default_factory=lambda: RewardSpec(name="rewards.code.prediction:PredictionReward"))
    """The sandboxed judge of predictions; its `args` may set the limits."""
