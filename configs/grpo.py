"""Group relative policy optimization."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import COLUMN, PromptData
from configs.lora import LoraConfig, refuse_beside_lora
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import (
    PolicyRolloutConfig,
    SamplingConfig,
    SyncConfig,
    fit_prompts,
    refuse_bounds,
)
from configs.sinks import SinkNames
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig

Level = Literal["token", "sequence", "completion"]
"""Level of a ratio: each token's own, the geometric mean over a completion (GSPO), or the product over it."""

MAX_KEPT = 2048
"""Largest top_k of GRPO: 8 KiB for each sampled token. vLLM's GPUs pack up to as many (0.32.0)."""

PRESETS: dict[str, dict[str, Any]] = {
    "deepseekmath": {},  # arXiv:2402.03300 eq. 3
    "deepseek_v2": {"ratio": "completion"},  # arXiv:2405.04434 eq. 32-34; beta is not printed
    "deepseek_r1": {  # arXiv:2501.12948 eq. 1-3, section 3.2.1
        "ratio": "completion",
        "clip_low": 10.0,
        "clip_high": 10.0,
        "kl_coef": 0.001,
    },
    "deepseek_v32": {  # arXiv:2512.02556 section 3.1; the mask's bound and beta are not printed
        "normalize_std": False,
        "kl": "unbiased",
        "kl_coef": 0.001,
        "off_policy_mask": 0.1,
    },
    "dapo": {"clip_high": 0.28, "aggregation": "token", "kl_coef": 0.0},  # arXiv:2503.14476 eq. 8
    "dr_grpo": {"aggregation": "fixed", "normalize_std": False, "kl_coef": 0.0},  # arXiv:2503.20783
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},  # arXiv:2507.18071 section 5
    "cispo": {  # arXiv:2506.13585 eq. 4; bounds of arXiv:2510.13786
        "surrogate": "cispo",
        "aggregation": "token",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "kl_coef": 0.0,
    },
    "rloo": {  # arXiv:2402.14740
        "baseline": "leave_one_out",
        "normalize_std": False,
        "ratio": "completion",
        "kl_coef": 0.0,
    },
}
"""Settings of `objective` by algorithm, where they differ from the defaults."""


class ObjectiveConfig(Settings):
    """GRPO's objective. The defaults are its form of single tokens (DeepSeekMath eq. 3)."""

    preset: (
        Literal[
            "deepseekmath", "deepseek_v2", "deepseek_r1", "deepseek_v32", "dapo", "dr_grpo", "gspo", "cispo", "rloo"
        ]
        | None
    ) = None
    """Settings of a published algorithm (docs/algorithm.md); keys beside it replace single ones."""
    clip_low: float = Field(default=0.2, gt=0)
    """The ratio is clipped below at 1 - clip_low; 1 or more leaves it without a bound there."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high. Larger than clip_low: DAPO's clip-higher."""
    clip_dual: float | None = Field(default=None, gt=1)
    """A negative advantage counts at most this many times, whatever the ratio (dual clip). None sets no bound."""
    ratio: Level = "token"
    """Importance ratio: of each token; `sequence`, its geometric mean over the completion (GSPO); `completion`, its
    product over the completion, with the divergence of whole completions (DeepSeek-V2 eq. 32-33, DeepSeek-R1)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """`clip`: min(ratio A, clip(ratio) A). `cispo`: A log pi, weighted by the clipped ratio without its gradient."""
    aggregation: Literal["sequence", "token", "fixed"] = "sequence"
    """`sequence`: mean over a completion's tokens, then over completions. `token`: mean over all tokens (DAPO).
    `fixed`: sum over tokens divided by sampling.max_tokens, then mean over completions (Dr. GRPO)."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """Baseline of a completion: the mean of its group, or of the group's other completions (RLOO)."""
    normalize_std: bool = True
    """Divide a group's centred rewards by their standard deviation. False: Dr. GRPO, DeepSeek-V3.2. `mixing: group`
    normalises each reward instead."""
    kl: Literal["k3", "unbiased"] = "k3"
    """Divergence to the reference: k3, or k3 times the ratio of the token, whose gradient is unbiased
    (DeepSeek-V3.2)."""
    kl_coef: float = Field(default=0.04, ge=0)
    """Coefficient beta of the divergence. 0 loads no reference."""
    kl_coef_of: dict[str, float] = Field(default_factory=dict[str, float])
    """Coefficient beta of prompts that a reward judges, by the reward's label, in place of kl_coef; the smallest where
    several judge. For weaker divergence in a domain, such as mathematics in DeepSeek-V3.2."""
    kl_target: float | None = Field(default=None, gt=0)
    """Divergence in nats a token that beta is adapted to from step to step, from kl_coef on: by 2 % at most, up where
    `loss/kl_mean` is above it and down where it is below (Ziegler et al., arXiv:1909.08593). None keeps kl_coef."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy of the tokens' distributions, which is then maximised too, in nats."""
    entropy_target: float | None = Field(default=None, gt=0)
    """Entropy in nats a token that its coefficient is adapted to, from entropy_coef on: 0.001 up after a step where
    `rollout/entropy_mean` is below it, 0.001 down, to 0 at least, where it is above. None keeps entropy_coef."""
    reference_every_steps: int | None = Field(default=None, ge=1)
    """Steps after which the reference becomes the policy, again and again (DeepSeek-R1: every 400 updates, which are
    400 / updates_per_batch steps). None keeps the first weights."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Importance sampling: cap of the weight pi_trainer/pi_rollout. None applies no weight, which
    is right where both compute alike, as in float32. In bfloat16 set it, to 2: without it a bias grows with length."""
    importance_level: Level = "token"
    """Level of that weight: `completion` is TRL's and verl's sequence level, `sequence` the geometric mean."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """`truncate` a weight to the cap, or `mask` what lies outside [importance_floor, importance_cap] with 0."""
    importance_floor: float = Field(default=0.0, ge=0)
    """Smallest weight that `mask` keeps."""
    off_policy_mask: float | None = Field(default=None, gt=0)
    """Leave completions of negative advantage out of the policy term where log pi_rollout - log pi_theta exceeds this
    many nats in the mean over their tokens (DeepSeek-V3.2). None leaves none out."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        return PRESETS.get(values.get("preset") or "", {}) | values

    @model_validator(mode="after")
    def _effective(self) -> "ObjectiveConfig":
        refusals = {
            "surrogate=cispo weighs tokens by their own ratio; use ratio=token": self.surrogate == "cispo"
            and self.ratio != "token",
            "clip_dual has no effect on surrogate=cispo; remove it": self.surrogate == "cispo"
            and self.clip_dual is not None,
            "ratio=completion is defined for aggregation=sequence; remove aggregation": self.ratio == "completion"
            and self.aggregation != "sequence",
            "kl=unbiased multiplies by the ratio of tokens; use ratio=token": self.kl == "unbiased"
            and self.ratio != "token",
            "baseline=leave_one_out is a centred reward without deviation; set normalize_std=false": (
                self.baseline == "leave_one_out" and self.normalize_std
            ),
            "importance_floor needs importance_mode=mask": bool(self.importance_floor)
            and self.importance_mode == "truncate",
            "importance_level and importance_mode have no effect without importance_cap": self.importance_cap is None
            and (self.importance_level, self.importance_mode) != ("token", "truncate"),
            "kl, kl_coef_of, kl_target and reference_every_steps have no effect with kl_coef=0; set kl_coef above 0": (
                not self.kl_coef
                and (self.kl != "k3" or bool(self.kl_coef_of or self.kl_target or self.reference_every_steps))
            ),
            "kl_target adapts one beta for all prompts; remove kl_coef_of": self.kl_target is not None
            and bool(self.kl_coef_of),
        }
        for refusal, applies in refusals.items():
            if applies:
                raise ValueError(f"objective.{refusal}")
        return self


class OverlongConfig(Settings):
    """Treatment of completions that reach max_tokens without an end."""

    mask: bool = False
    """Leave them out of the loss (DAPO's overlong filtering). Their rewards still count in the group's mean."""
    shaping_tokens: int = Field(default=0, ge=0)
    """Tokens before max_tokens over which a penalty grows linearly from 0 to -1 (DAPO eq. 13). 0 applies none."""


class DynamicSamplingConfig(Settings):
    """Replacement of groups whose rewards are all equal, which give no gradient (DAPO section 3.2)."""

    max_rounds: int = Field(default=1, ge=1)
    """Most rounds of generation in a step; 1 replaces no group."""


AlarmName = Literal[
    "completions cut short",
    "collapsed rewards",
    "completions left out",
    "reward hacking",
    "length drift",
    "entropy collapse",
    "repetition",
]
"""Alarms of a run; docs/gates.md gives the condition of each."""


class ValidationConfig(Settings):
    """Evaluation of the policy while it trains, on the suites of the gate that will judge the stage."""

    gate: str
    """A gate of the recipe, or the YAML file of one. Its suites run on the stage's own engines; its first rule's figure
    selects the best checkpoint, which is kept as `best/hf`."""
    every_steps: int = Field(ge=1)
    """Steps between evaluations; the last step is always evaluated."""

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether the policy is evaluated after `step`."""
        return step % self.every_steps == 0 or step == last_step


class GRPOConfig(Settings):
    """Group relative policy optimization."""

    type: Literal["grpo"]
    """Selects this stage."""
    model: ModelConfig
    """First weights of the policy, and the frozen reference."""
    prompts: PromptData
    """Prompts, each with the truth to judge by."""
    rewards: list[RewardSpec] = Field(min_length=1)
    """Rewards with their coefficients."""
    mixing: Literal["none", "batch", "group"] = "none"
    """Normalisation of each reward's scores before they are summed. `none`: none. `batch`: centred and divided by the
    standard deviation over the step. `group`: the same over the completion's group; the sums, normalised over the step,
    are the advantages (GDPO)."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Processes that judge."""
    steps: int = Field(ge=1)
    """Rollout batches, each sampled, judged, learned from and followed by a weight sync."""
    prompts_per_step: int = Field(ge=1)
    """Prompts P of one step."""
    group_size: int = Field(ge=2)
    """Completions G of one prompt."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps on one rollout batch."""
    split: Literal["prompts", "completions"] = "prompts"
    """Split of a rollout batch into its updates: whole groups, or completions at random whatever their prompt
    (DeepSeek-R1), whose prompts are then computed in several updates."""
    routing_replay: Literal["none", "rollout", "policy"] = "none"
    """Routes that training replays instead of routing tokens anew; the gates' weights still learn. `rollout`: the
    engine's routes from sampling (R3). `policy`: the trainer's routes before the first of updates_per_batch updates
    (R2). The reference always routes for itself."""
    sampling: SamplingConfig
    """Sampling of the completions. The distribution that temperature, top_p and top_k leave is the one that is trained,
    in every log-probability of the objective."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """Loss."""
    mtp_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss that trains the checkpoint's multi-token prediction modules on the sampled tokens, so that
    they follow the policy. Its gradient does not reach the policy; the weight only counts in the clipped gradient norm,
    and 0.01 is enough. 0 leaves the modules out, of the result too."""
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)
    """Treatment of completions without an end."""
    dynamic_sampling: DynamicSamplingConfig = Field(default_factory=DynamicSamplingConfig)
    """Replacement of groups without spread."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    lora: LoraConfig | None = None
    """Low-rank adapters, trained instead of the weights. None trains all weights."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """DeepSpeed ranks."""
    rollout: PolicyRolloutConfig
    """vLLM engines."""
    placement: Literal["colocated", "separate"] = "colocated"
    """GPUs of the engines: `colocated` on those of the ranks, in turns with them, or `separate` on GPUs of their own.
    No effect without GPUs."""
    sync: SyncConfig = Field(default_factory=SyncConfig)
    """Proof of each weight sync."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints to resume from."""
    validation: ValidationConfig | None = None
    """Evaluation within the stage. None evaluates nothing."""
    stop_on: list[AlarmName] = Field(default_factory=list[AlarmName])
    """Alarms that stop the run; others are only reported."""
    report_to: SinkNames | None = None
    """Services that get figures and samples beside TensorBoard's files. None takes `report_to` of the recipe."""
    seed: int = Field(default=0, ge=0)
    """Seed of prompt order and sampling."""

    def validates(self, step: int) -> bool:
        """Return whether the policy is evaluated after `step`."""
        return self.validation is not None and self.validation.is_due(step, self.steps)

    @model_validator(mode="after")
    def _sound(self) -> "GRPOConfig":
        if self.prompts_per_step % self.updates_per_batch:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} must be a multiple of "
                f"updates_per_batch={self.updates_per_batch}"
            )
        minibatch = self.prompts_per_step // self.updates_per_batch
        if minibatch % self.trainer.num_ranks and self.trainer.num_ranks % minibatch:
            raise ValueError(
                f"prompts of one update ({minibatch}) must be a multiple of trainer.num_ranks="
                f"{self.trainer.num_ranks}, or divide it"
            )
        if minibatch * self.group_size < self.trainer.num_ranks:
            raise ValueError(
                f"one update has {minibatch} prompts x group_size={self.group_size} completions, fewer than "
                f"trainer.num_ranks={self.trainer.num_ranks}; lower num_ranks"
            )
        fit_prompts(self.prompts, self.sampling, self.rollout)
        if self.objective.baseline == "leave_one_out" and self.mixing == "group":
            raise ValueError("objective.baseline=leave_one_out has no effect with mixing=group; remove one of them")
        if self.overlong.shaping_tokens and self.mixing == "group":
            raise ValueError(
                "overlong.shaping_tokens would be added to rewards that mixing=group has made advantages already; "
                "remove it, or give the reward `length` a weight instead"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 samples the same completion in the whole group; set it above 0")
        if self.sampling.top_p < 1 and not self.sampling.top_k:
            raise ValueError(
                "sampling.top_p needs sampling.top_k, which bounds the tokens that are kept; set it to 512"
            )
        if self.sampling.top_k > MAX_KEPT:
            raise ValueError(
                f"sampling.top_k={self.sampling.top_k}: at most {MAX_KEPT} kept tokens of each sampled one are sent to "
                "the trainer; lower it, or set it to 0 and top_p to 1 to keep all"
            )
        if self.overlong.shaping_tokens >= self.sampling.max_tokens:
            raise ValueError("overlong.shaping_tokens must be smaller than sampling.max_tokens")
        return self

    @model_validator(mode="after")
    def _rewards_judge(self) -> "GRPOConfig":
        labels = [spec.label for spec in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: every label may appear once, got {labels}; set `label`")
        if not any(spec.weight for spec in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing would be learned; give one a weight")
        selected = (self.prompts.reward or "").split()
        if selected and not selected[0].startswith(COLUMN):
            for label in selected:
                if label not in labels:
                    raise ValueError(f"prompts.reward='{label}' is not among rewards: {labels}")
            idle = [label for label in labels if label not in selected]
            if idle:
                raise ValueError(f"rewards: '{idle[0]}' has no effect, since prompts.reward names others; remove it")
        for label in self.objective.kl_coef_of:
            if label not in labels:
                raise ValueError(f"objective.kl_coef_of.{label} is not among rewards: {labels}")
        if len(labels) == 1 and (self.rewards[0].gate is not None or self.mixing != "none"):
            raise ValueError("rewards.0.gate and mixing have no effect on a single reward; remove them")
        return self

    @model_validator(mode="after")
    def _lag_fits(self) -> "GRPOConfig":
        lag = f"rollout.max_lag={self.rollout.max_lag}"
        if self.rollout.max_lag and self.placement == "colocated":
            raise ValueError(
                f"{lag} lets engines sample while the ranks train, which engines on the ranks' own devices can't; set "
                "placement to separate, or rollout.max_lag to 0"
            )
        if self.rollout.max_lag and self.objective.importance_cap is None and self.objective.off_policy_mask is None:
            raise ValueError(
                f"{lag} trains tokens of older weights, and nothing corrects for it; set objective.importance_cap, to "
                "2 for instance, or objective.off_policy_mask"
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> "GRPOConfig":
        refuse_bounds(self.sync, self.model.dtype, self.trainer, self.rollout)
        refuse_beside_lora(self.lora, self.trainer, mtp=self.mtp_weight > 0)
        if self.lora is not None and self.objective.reference_every_steps:
            raise ValueError(
                f"objective.reference_every_steps={self.objective.reference_every_steps} can't be combined with lora, "
                "whose reference is the model without adapters; remove one of them"
            )
        if (self.objective.reference_every_steps or 0) >= self.steps:
            raise ValueError(
                f"objective.reference_every_steps={self.objective.reference_every_steps} has no effect within "
                f"steps={self.steps}; lower it or remove it"
            )
        if self.updates_per_batch == 1 and self.split == "completions":
            raise ValueError("split=completions has no effect with updates_per_batch=1; raise it or remove split")
        if self.updates_per_batch == 1 and self.routing_replay == "policy":
            raise ValueError(
                "routing_replay=policy has no effect with updates_per_batch=1, where the policy's routes are its own; "
                "raise updates_per_batch, or replay the rollout's routes"
            )
        if self.updates_per_batch == 1 and (self.objective.ratio == "sequence" or self.objective.surrogate == "cispo"):
            raise ValueError(
                "objective.ratio and objective.surrogate have no effect with updates_per_batch=1, where the ratio is "
                "exactly 1; raise updates_per_batch or remove them"
            )
        return self
