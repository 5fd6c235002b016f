"""Sampling of completions, the engines, and the proof of a weight sync."""

from typing import Annotated, Literal

from pydantic import Field

from configs.base import Settings, fit_default
from configs.data import PromptData
from configs.model import AnyDtype
from configs.train import TrainerConfig


class CompletionConfig(Settings):
    """End of a completion that is sampled from the policy's own distribution."""

    max_tokens: int = Field(ge=1)
    """Longest completion in tokens."""
    ignore_eos: bool = False
    """Sample exactly `max_tokens` tokens. For benchmarks."""

    def of_policy(self) -> "SamplingConfig":
        """Sample from the policy's own distribution."""
        return SamplingConfig(max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)


class SamplingConfig(CompletionConfig):
    """Sampling of a completion."""

    temperature: float = Field(default=1.0, ge=0)
    """Softmax temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus size; 1 keeps the whole distribution. No effect at temperature 0."""
    top_k: int = Field(default=0, ge=0)
    """Number of likeliest tokens to sample from; 0 keeps all. No effect at temperature 0."""

    @property
    def is_truncated(self) -> bool:
        """True where top_k or top_p leave tokens out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class RolloutConfig(Settings):
    """vLLM engines."""

    num_engines: int = Field(default=1, ge=1)
    """Engines, each a Ray actor with its own copy of the policy."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices of one engine, all of one machine unless `span_nodes` is true; without GPUs, its processes, which share
    `threads`."""
    span_nodes: bool = False
    """Allow an engine devices of several machines. The network between them then slows every token down."""
    max_model_len: int = Field(ge=16)
    """Longest prompt with completion, in tokens."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Most completions that an engine decodes at once."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """KV cache in GiB on each device of an engine, or on the CPU of one engine. `auto` takes what the weights, and a
    sleeping rank on the same GPU, leave of a GPU's memory; it needs GPUs."""
    fp8: list[Literal["weights", "kv_cache"]] = Field(default_factory=list[Literal["weights", "kv_cache"]])
    """Tensors in FP8: `weights`, quantised in blocks of 128 x 128 at every sync, and `kv_cache`. With either,
    engine and trainer differ by more than `sync` allows by default: set its gaps from a measurement. On a CPU without
    AMX, weights are rounded to the same numbers and multiplied in bfloat16."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one engine; 0 takes every core of the machine."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time for a generation or a sync; after it the run stops with the reason."""
    start_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Longest time for an engine to start and load its weights."""
    max_replacements: int = Field(default=3, ge=0)
    """Engines that a stage replaces after their process ended, with their completions continued; one more stops it."""


class PolicyRolloutConfig(RolloutConfig):
    """vLLM engines that sample from a policy in training."""

    max_lag: int = Field(default=0, ge=0)
    """Most versions of the policy by which the weights that sampled a token may lie behind those that it trains. 0: a
    step's completions are sampled with the newest weights, in turns with training. k: while a step trains, engines
    begin the completions of the next k steps, and continue them with each new version. It needs `placement: separate`,
    and objective.importance_cap or objective.off_policy_mask."""


class SyncConfig(Settings):
    """Bounds of the proof that engines and trainer hold the same weights after a sync."""

    max_mean_gap: float | None = Field(default=None, gt=0)
    """Largest mean |trainer - engine| log-probability in nats: over the tokens of the probe (fixed sequences of the
    prompts' text and of random tokens) after a sync, and over a step's sampled tokens without the sequence that differs
    most. None allows 6 times the mean difference that rounding alone makes in the policy's log-probabilities on the
    probe, measured at every tenth step; in bfloat16, after the first sync, at most 3 times its gap in this unit."""
    max_gap: float | None = Field(default=None, gt=0)
    """Largest |trainer - engine| log-probability on any token of the probe, in nats. None allows 16 times the largest
    difference that rounding alone makes on a token."""


def fit_prompts(prompts: PromptData, sampling: CompletionConfig, rollout: RolloutConfig, key: str = "prompts") -> None:
    """Lower max_prompt_length, where it was not set, to what the engines take beside a completion. Raise ValueError
    where it was set to more."""
    fit_default(prompts, "max_prompt_length", rollout.max_model_len - sampling.max_tokens)
    if prompts.max_prompt_length + sampling.max_tokens > rollout.max_model_len:
        raise ValueError(
            f"{key}.max_prompt_length={prompts.max_prompt_length} + sampling.max_tokens={sampling.max_tokens} exceeds "
            f"rollout.max_model_len={rollout.max_model_len}; lower one of the former or raise the latter"
        )


def refuse_bounds(sync: SyncConfig, dtype: AnyDtype, trainer: TrainerConfig, rollout: RolloutConfig) -> None:
    """Raise ValueError for bounds of `sync` that trainer and engines can't keep, or that can't be measured."""
    in_fp8 = [name for name, used in (("trainer.fp8", trainer.fp8), ("rollout.fp8", rollout.fp8)) if used]
    if in_fp8 and (sync.max_mean_gap is None or sync.max_gap is None):
        raise ValueError(
            f"sync.max_mean_gap and sync.max_gap must be given with {in_fp8[0]}: their defaults are measured from the "
            "rounding of model.dtype, and FP8 is coarser; set both to a few times the sync/gap_mean and sync/gap_max "
            "of a short run with wide bounds (docs/numerics.md)"
        )
    if dtype == "bfloat16" and sync.max_mean_gap is not None and sync.max_mean_gap < 1e-3:
        raise ValueError(
            f"sync.max_mean_gap={sync.max_mean_gap} is for float32; with model.dtype=bfloat16 trainer and engine "
            "differ by more than 1e-3: raise it, or remove it to have it measured"
        )
