"""Bases of the evaluation suites: their judges, files, and bounds of lengths."""

from pathlib import Path

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import Source
from configs.model import ModelConfig
from configs.rewards import RewardSpec


class BaseSuite(Settings):
    """Base of all suites: the rewards and files that a suite uses, and the bounds of its lengths."""

    def rewards(self) -> list[RewardSpec]:
        """Rewards that judge the suite's completions."""
        return []

    def reads(self) -> dict[str, Source | Path]:
        """Sources and files that the suite reads, by key."""
        return {}

    def longest(self) -> tuple[str, int] | None:
        """Key and value of the bound on scored token sequences; None for a suite that samples completions."""
        return None

    def checkpoints(self) -> dict[str, ModelConfig]:
        """Other checkpoints whose answers the suite compares with, by key."""
        return {}

    def longest_prompt(self) -> tuple[str, int] | None:
        """Key and value of the bound on prompts that must leave room for a completion; None where each prompt is
        checked when it is read."""
        return None


class SourceSuite(BaseSuite):
    """A suite of rows in a known format."""

    source: Source
    """Source of the rows."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the evaluation stops."""

    def reads(self) -> dict[str, Source | Path]:
        return {"source": self.source}


class PromptedSuite(SourceSuite):
    """A suite of prompts."""

    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens. A longer one is a bad row; it is never truncated."""


class JudgedSuite(BaseSuite):
    """A suite whose completions pass or fail by one reward's score."""

    pass_score: float = 1.0
    """Lowest score of a completion that passes."""
    samples: int = Field(default=1, ge=0)
    """Sampled completions of each prompt, besides the greedy one."""
    k: list[int] = Field(default_factory=list[int])
    """Values of k for the unbiased pass@k, each at most `samples`."""

    @model_validator(mode="after")
    def _enough(self) -> "JudgedSuite":
        if any(k < 1 or k > self.samples for k in self.k):
            raise ValueError(f"every k of {self.k} must lie between 1 and samples={self.samples}")
        return self


class ShotSuite(SourceSuite):
    """A suite with worked examples before every question."""

    shots: int = Field(default=0, ge=0)
    """Worked examples before every question: the first of `shots_source`."""
    shots_source: Source | None = None
    """Source of the worked examples, in the same format. Set together with `shots`."""

    @model_validator(mode="after")
    def _shots_have_a_source(self) -> "ShotSuite":
        if (self.shots == 0) != (self.shots_source is None):
            raise ValueError("'shots' and 'shots_source' go together: set both or neither")
        return self

    def reads(self) -> dict[str, Source | Path]:
        shots: dict[str, Source | Path] = {} if self.shots_source is None else {"shots_source": self.shots_source}
        return {"source": self.source, **shots}
