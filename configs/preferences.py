"""Preference data: what is sampled or read, and what is kept of it."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import ComparisonData, PromptData
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sample import check_asked, check_name
from configs.sampling import RolloutConfig, SamplingConfig


class SampledPairs(Settings):
    """Pairs of the model's own answers, told apart by a reward (DeepSeek-V2 section 4.2: compiler feedback for code,
    ground-truth labels for mathematics)."""

    prompts: PromptData
    """What is asked, and the truth to judge by."""
    reward: RewardSpec
    """Who judges the answers."""
    domain: str
    """What the pairs are called in shares, figures and the rows."""


class ReadPairs(Settings):
    """Comparisons that somebody else has made."""

    data: ComparisonData
    """Where they come from, and in which form."""
    domain: str
    """What they are called in shares, figures and the rows, where a row has no domain of its own."""


class PairFilters(Settings):
    """What a comparison must be like to be kept; every dropped one is counted by its reason. The order of the rows does
    not decide which."""

    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference of the scores of best and worst answer, where there are scores. Equal ones are dropped."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Most comparisons of one prompt within a domain, the widest margins first."""
    max_similarity: float = Field(default=1.0, ge=0.5, le=1)
    """Jaccard similarity of the word trigrams of two comparisons past which one of them is dropped as the other's
    near-duplicate. Comparisons of one prompt are no duplicates of each other. 1 drops exact duplicates only."""
    max_length_ratio: float | None = Field(default=None, gt=1)
    """Largest ratio of the longer to the shorter of best and worst answer, in characters. None allows any."""
    balance_length: bool = False
    """Drop pairs until, within each domain, the better answer is the longer one no more often than the shorter."""


class PreferencesConfig(Settings):
    """Preference data as a data set of comparisons."""

    type: Literal["preferences"]
    """Selects this stage."""
    model: ModelConfig | None = None
    """Whose answers are sampled. Set together with `sampled`."""
    sampled: dict[str, SampledPairs] = Field(default_factory=dict[str, SampledPairs])
    """Pairs to make, by the name of their source."""
    read: dict[str, ReadPairs] = Field(default_factory=dict[str, ReadPairs])
    """Comparisons to read, by the name of their source."""
    samples: int = Field(default=8, ge=2)
    """Answers k sampled for a prompt."""
    sampling: SamplingConfig | None = None
    """How answers are drawn. Set together with `sampled`."""
    rollout: RolloutConfig | None = None
    """The vLLM engines. Set together with `sampled`."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Where the rewards run."""
    filters: PairFilters = Field(default_factory=PairFilters)
    """What is kept."""
    shares: dict[str, float] = Field(default_factory=dict[str, float])
    """Share of each domain in what is kept, adding up to 1; domains are cut down to the scarcest. Empty keeps all."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts that goes to the split `held_out`, chosen by the hash of the prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling and of what is cut."""

    @model_validator(mode="after")
    def _sound(self) -> "PreferencesConfig":
        if not self.sampled and not self.read:
            raise ValueError("neither 'sampled' nor 'read' is set: there is nothing to make pairs of")
        both = sorted(self.sampled.keys() & self.read.keys())
        if both:
            raise ValueError(f"'{both[0]}' is a name in both 'sampled' and 'read'; rename one")
        for name, source in self.read.items():
            check_name(f"read.{name}")
            if source.data.max_length != ComparisonData.model_fields["max_length"].default:
                raise ValueError(f"read.{name}.data.max_length has no effect before there is a tokenizer; remove it")
        if self.shares and (min(self.shares.values()) <= 0 or abs(sum(self.shares.values()) - 1) > 1e-6):
            raise ValueError(f"shares={self.shares}: every share is above 0, and all add up to 1")
        return self

    @model_validator(mode="after")
    def _can_sample(self) -> "PreferencesConfig":
        given = {name for name in ("model", "sampling", "rollout") if getattr(self, name) is not None}
        if given and not self.sampled:
            raise ValueError(f"'{sorted(given)[0]}' has no effect without 'sampled'; remove it")
        missing = {"model", "sampling", "rollout"} - given
        if self.sampled and missing:
            raise ValueError(f"'sampled' needs '{sorted(missing)[0]}'")
        if self.sampling is None or self.rollout is None:
            return self
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 makes every answer the same; set it above 0")
        for name, source in self.sampled.items():
            check_asked(f"sampled.{name}", source.prompts, source.reward, self.sampling, self.rollout)
        return self
