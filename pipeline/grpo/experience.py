"""Experience of one GRPO step: groups of completions with their verdicts and rewards.

Shape suffixes: P prompts, G completions of a prompt.
"""

from dataclasses import dataclass

from pipeline.data.prompts import Prompt
from pipeline.objectives.advantage import Array
from rewards.types import Verdict
from rollout.types import StoredGroup


@dataclass(frozen=True)
class JudgedGroup:
    """G completions of a prompt, each with its verdicts by reward label."""

    prompt: Prompt
    group: StoredGroup
    verdicts: list[dict[str, Verdict]]

    @property
    def lengths_G(self) -> list[int]:
        return [completion.num_tokens for completion in self.group.completions]


@dataclass(frozen=True)
class Experience:
    """P judged groups to learn from, and metrics of all groups that were sampled for them.

    rewards_PG: float64, NaN for a completion that could not be judged.
    """

    groups: list[JudgedGroup]
    rewards_PG: Array
    metrics: dict[str, float]
