"""Sampling of training conversations: rejection sampling and distillation (DeepSeek-V3 section 5.1)."""

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import PromptData
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig


class SampledDomain(Settings):
    """Prompts of one domain, and which answers to them are kept."""

    prompts: PromptData
    """What is asked, and the truth to judge by."""
    reward: RewardSpec | None = None
    """Who verifies the answers. None keeps answers unverified."""
    min_score: float = 1.0
    """Score from which on an answer may be kept. Has an effect only with `reward`."""
    keep: int = Field(default=1, ge=1)
    """Answers kept of one prompt: the best scores, and of equal ones the shortest. Equal texts are kept once."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer kept, in tokens. None keeps any that ended."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most conversations kept of this domain, drawn by the seed. None keeps all."""


class SampleConfig(Settings):
    """Conversations made of a model's own verified answers: rejection sampling, or distillation where `model` is
    another than the one that will be trained."""

    type: Literal["sample"]
    """Selects this stage."""
    model: ModelConfig
    """Who answers."""
    domains: dict[str, SampledDomain] = Field(min_length=1)
    """What is asked, by the name of the domain."""
    samples: int = Field(default=8, ge=1)
    """Answers k sampled for a prompt."""
    sampling: SamplingConfig
    """How answers are drawn."""
    rollout: RolloutConfig
    """The vLLM engines."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Where the rewards run."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts that goes to the split `held_out`, chosen by the hash of the prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling and of what is cut."""

    @model_validator(mode="after")
    def _sound(self) -> "SampleConfig":
        if self.sampling.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} at sampling.temperature=0 are all the same; raise it")
        for name, domain in self.domains.items():
            if domain.keep > self.samples:
                raise ValueError(f"domains.{name}.keep={domain.keep} is more than samples={self.samples}")
            if domain.reward is None and domain.min_score != 1.0:
                raise ValueError(f"domains.{name}.min_score has no effect without a reward; remove it")
            if domain.max_tokens is not None and domain.max_tokens >= self.sampling.max_tokens:
                raise ValueError(
                    f"domains.{name}.max_tokens={domain.max_tokens} has no effect with sampling.max_tokens="
                    f"{self.sampling.max_tokens}; lower or remove it"
                )
            check_asked(f"domains.{name}", domain.prompts, domain.reward, self.sampling, self.rollout)
        return self


def check_asked(
    key: str, prompts: PromptData, reward: RewardSpec | None, sampling: SamplingConfig, rollout: RolloutConfig
) -> None:
    """Raises ValueError where prompts below `key` and their answers don't fit the engine, and where a setting of the
    reward would have no effect."""
    check_name(key)
    if prompts.reward is not None or (reward is not None and (reward.weight != 1 or reward.gate is not None)):
        raise ValueError(f"{key}: prompts.reward, reward.weight and reward.gate have no effect here; remove them")
    if prompts.max_prompt_length + sampling.max_tokens > rollout.max_model_len:
        raise ValueError(
            f"{key}.prompts.max_prompt_length={prompts.max_prompt_length} + sampling.max_tokens={sampling.max_tokens} "
            f"exceeds rollout.max_model_len={rollout.max_model_len}; lower the former or raise the latter"
        )


def check_name(key: str) -> None:
    """Raises ValueError where the last part of `key`, a name that the user gave, does not do as a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", key.partition(".")[2]):
        raise ValueError(f"{key}: its name becomes a file's; write it with letters, digits, '_' and '-'")
