"""Preference data: comparisons that are sampled or read, and filters on them."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import ComparisonData, PromptData
from configs.judging import RubricConfig
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sample import check_prompts, check_source_name
from configs.sampling import RolloutConfig, SamplingConfig


class SampledPairs(Settings):
    """Pairs of the model's own answers, ranked by a reward (DeepSeek-V2 section 4.2: compiler feedback for code,
    ground-truth labels for mathematics)."""

    prompts: PromptData
    """Prompts, each with the truth to judge by."""
    reward: RewardSpec
    """Reward that judges the answers."""
    domain: str
    """Domain of the pairs, in shares, figures and rows."""
    reasoning: Literal["keep", "drop"] = "keep"
    """`drop` leaves the chain of thought out before answers are judged and paired, for a reward model that reads the
    final answer alone."""

    @property
    def rewards(self) -> list[RewardSpec]:
        """The reward, as a list like that of other sampled answers."""
        return [self.reward]


class ReadPairs(Settings):
    """Comparisons from an existing data set."""

    data: ComparisonData
    """Source and format of the comparisons."""
    domain: str
    """Domain in shares, figures and rows, for rows without a domain of their own."""


class PairFilters(Settings):
    """Filters on comparisons. Each dropped comparison is counted by its reason; the order of the rows plays no part."""

    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference between the scores of best and worst answer, where there are scores. Pairs with equal scores
    are dropped."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Most comparisons of one prompt within a domain; the widest margins are kept."""
    max_similarity: float = Field(default=1.0, ge=0.5, le=1)
    """Largest Jaccard similarity of the word trigrams of two comparisons; above it one of them is dropped as a
    near-duplicate. Comparisons of the same prompt are not compared. 1 drops exact duplicates only."""
    max_length_ratio: float | None = Field(default=None, gt=1)
    """Largest ratio of the longer to the shorter of best and worst answer, in characters. None allows any."""
    balance_length: bool = False
    """Drop pairs until, within each domain, the better answer is the longer one in at most half of them."""


class PreferencesConfig(Settings):
    """Preference data as a data set of comparisons."""

    type: Literal["preferences"]
    """Selects this stage."""
    model: ModelConfig | None = None
    """Model whose answers are sampled. Set together with `sampled`."""
    sampled: dict[str, SampledPairs] = Field(default_factory=dict[str, SampledPairs])
    """Pairs to sample, by the name of their source."""
    read: dict[str, ReadPairs] = Field(default_factory=dict[str, ReadPairs])
    """Comparisons to read, by the name of their source."""
    samples: int = Field(default=8, ge=2)
    """Answers k sampled for each prompt."""
    sampling: SamplingConfig | None = None
    """Sampling of the answers. Set together with `sampled`."""
    rollout: RolloutConfig | None = None
    """vLLM engines. Set together with `sampled`."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Processes that judge."""
    filters: PairFilters = Field(default_factory=PairFilters)
    """Filters on all comparisons."""
    shares: dict[str, float] = Field(default_factory=dict[str, float])
    """Share of each domain in the result, adding up to 1; larger domains are reduced to fit the scarcest. Empty keeps
    all."""
    judge: RubricConfig | None = None
    """Write prompts that ask for verdicts on the comparisons in the place of these, to train a judge: its prompt and
    the form of its verdicts. None writes comparisons."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts in the split `held_out`, by the hash of the prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling and of the reduction to `shares`."""

    @model_validator(mode="after")
    def _sound(self) -> "PreferencesConfig":
        if not self.sampled and not self.read:
            raise ValueError("neither 'sampled' nor 'read' is set: there is nothing to make pairs of")
        both = sorted(self.sampled.keys() & self.read.keys())
        if both:
            raise ValueError(f"'{both[0]}' is a name in both 'sampled' and 'read'; rename one")
        for name, source in self.read.items():
            check_source_name(f"read.{name}")
            if source.data.max_length != ComparisonData.model_fields["max_length"].default:
                raise ValueError(f"read.{name}.data.max_length has no effect before there is a tokenizer; remove it")
        if self.judge is not None and self.judge.votes != 1:
            raise ValueError(f"judge.votes={self.judge.votes} has no effect on prompts; remove it")
        if self.shares and (min(self.shares.values()) <= 0 or abs(sum(self.shares.values()) - 1) > 1e-6):
            raise ValueError(f"shares={self.shares}: every share is above 0, and all add up to 1")
        return self

    @model_validator(mode="after")
    def _can_sample(self) -> "PreferencesConfig":
        present = {name for name in ("model", "sampling", "rollout") if getattr(self, name) is not None}
        if present and not self.sampled:
            raise ValueError(f"'{sorted(present)[0]}' has no effect without 'sampled'; remove it")
        missing = {"model", "sampling", "rollout"} - present
        if self.sampled and missing:
            raise ValueError(f"'sampled' needs '{sorted(missing)[0]}'")
        if self.sampling is None or self.rollout is None:
            return self
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 makes every answer the same; set it above 0")
        for name, source in self.sampled.items():
            check_prompts(f"sampled.{name}", source.prompts, source.reward, self.sampling, self.rollout)
        return self
