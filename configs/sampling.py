"""How completions are drawn, and the engine that draws them."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings


class CompletionConfig(Settings):
    """Where a completion ends. GRPO has no more to say of sampling: its completions come from the policy itself, since
    any temperature, top_p or top_k would draw from another distribution than the one that is trained."""

    max_tokens: int = Field(ge=1)
    """Longest completion in tokens."""
    ignore_eos: bool = False
    """Sample exactly `max_tokens` tokens. For benchmarks."""

    def of_policy(self) -> "SamplingConfig":
        """Sampling from the policy's own distribution."""
        return SamplingConfig(max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)


class SamplingConfig(CompletionConfig):
    """How one completion is sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """Softmax temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus size; 1 keeps the whole distribution."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""

    @model_validator(mode="after")
    def _has_effect(self) -> "SamplingConfig":
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k have no effect at temperature 0; remove them or raise the temperature")
        return self


class RolloutConfig(Settings):
    """The vLLM engines."""

    num_engines: int = Field(default=1, ge=1)
    """Engines, each a Ray actor with its own copy of the policy."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices per engine."""
    max_model_len: int = Field(ge=16)
    """Longest prompt plus completion in tokens."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Completions an engine decodes at once."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of one engine in GiB."""
    fp8: list[Literal["weights", "kv_cache"]] = Field(default_factory=list[Literal["weights", "kv_cache"]])
    """What the engines keep in FP8: `weights`, quantised anew in blocks of 128 x 128 at every sync, and `kv_cache`.
    Either takes the engine further from the trainer than `sync` allows by default: raise its gaps to what is
    measured."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one engine; 0 takes every core of the machine."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest a generation or a sync may take before the run stops with the reason."""


class SyncConfig(Settings):
    """Weights from trainer to engines, and the proof that they arrived."""

    max_mean_gap: float | None = Field(default=None, gt=0)
    """Largest mean |trainer - engine| log-probability in nats, over the tokens of the probe (a few fixed random
    sequences) after a sync and over a step's sampled tokens but those of the sequence furthest off. None allows
    6 times the mean difference that rounding alone makes in the policy's own log-probabilities on the probe, measured
    at every sync."""
    max_gap: float | None = Field(default=None, gt=0)
    """Largest |trainer - engine| log-probability on any token of the probe, in nats. None allows 16 times the
    largest difference that rounding alone makes on a token."""
