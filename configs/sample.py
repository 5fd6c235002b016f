"""Sampling of training conversations: rejection sampling and distillation (DeepSeek-V3 section 5.1)."""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import PromptData
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig, fit_prompts


class SampledDomain(Settings):
    """Prompts of one domain, and the selection of their answers."""

    prompts: PromptData
    """Prompts, each with the truth to judge by."""
    reward: RewardSpec | None = None
    """Reward that verifies the answers. None keeps unverified answers."""
    min_score: float = 1.0
    """Lowest score of an answer that is kept. Has an effect only with `reward`."""
    filters: list[RewardSpec] = Field(default_factory=list[RewardSpec])
    """Further rewards, each with a `gate`: the lowest score of an answer that is kept. DeepSeek-R1 drops thoughts in
    mixed languages so."""
    drop_solved: bool = False
    """Drop prompts all of whose answers end and reach min_score: too easy to teach anything (SPCT, with samples: 3)."""
    keep: int = Field(default=1, ge=1)
    """Answers kept of each prompt: those with the best scores, the shortest of equal ones; equal texts once."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer kept, in tokens. None keeps any that ended."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most conversations of this domain, drawn at random by the seed. None keeps all."""

    @property
    def rewards(self) -> list[RewardSpec]:
        """The reward and the filters."""
        return judging_rewards(self.reward, self.filters)


class SampleConfig(Settings):
    """Training conversations from a model's verified answers: rejection sampling, or distillation where another model
    will be trained."""

    type: Literal["sample"]
    """Selects this stage."""
    model: ModelConfig
    """Model that answers."""
    domains: dict[str, SampledDomain] = Field(min_length=1)
    """Prompts by the name of their domain."""
    samples: int = Field(default=8, ge=1)
    """Answers k sampled for each prompt."""
    sampling: SamplingConfig
    """Sampling of the answers."""
    rollout: RolloutConfig
    """vLLM engines."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Processes that judge."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts in the split `held_out`, by the hash of the prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling and of `max_rows`."""

    @model_validator(mode="after")
    def _sound(self) -> "SampleConfig":
        if self.sampling.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} at sampling.temperature=0 are all the same; raise it")
        for name, domain in self.domains.items():
            if domain.keep > self.samples:
                raise ValueError(f"domains.{name}.keep={domain.keep} is more than samples={self.samples}")
            if domain.reward is None and domain.min_score != 1.0:
                raise ValueError(f"domains.{name}.min_score has no effect without a reward; remove it")
            if domain.reward is None and domain.drop_solved:
                raise ValueError(f"domains.{name}.drop_solved has no effect without a reward; remove it")
            check_prompts(f"domains.{name}", domain.prompts, domain.reward, self.sampling, self.rollout)
            labels = [spec.label for spec in domain.rewards]
            if len(set(labels)) < len(labels):
                raise ValueError(f"domains.{name}: every label may appear once, got {labels}; set `label`")
            for spec in domain.filters:
                if spec.gate is None or spec.weight != 1:
                    raise ValueError(
                        f"domains.{name}.filters: '{spec.label}' needs a gate, the lowest score that is kept, and its "
                        "weight has no effect"
                    )
        return self


def judging_rewards(reward: RewardSpec | None, filters: Sequence[RewardSpec]) -> list[RewardSpec]:
    """Join the reward of sampled answers, if there is one, and the filters."""
    return [*([reward] if reward is not None else []), *filters]


def check_prompts(
    key: str, prompts: PromptData, reward: RewardSpec | None, sampling: SamplingConfig, rollout: RolloutConfig
) -> None:
    """Raise ValueError for prompts below `key` that leave no room for an answer, or reward settings without effect."""
    check_source_name(key)
    if prompts.reward is not None or (reward is not None and (reward.weight != 1 or reward.gate is not None)):
        raise ValueError(f"{key}: prompts.reward, reward.weight and reward.gate have no effect here; remove them")
    fit_prompts(prompts, sampling, rollout, f"{key}.prompts")


def check_source_name(key: str) -> None:
    """Raise ValueError where the last part of `key`, the user's name of a source, can't be the name of a file."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", key.partition(".")[2]):
        raise ValueError(f"{key}: its name becomes a file's; write it with letters, digits, '_' and '-'")
