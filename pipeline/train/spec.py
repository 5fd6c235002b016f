"""Messages between a stage and its training ranks: the spec of a rank, and the sums of its passes.

This file imports no torch, like everything that drives ranks and engines (docs/architecture.md).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from configs.balance import V2Balance, V3Balance
from configs.distill import DistillObjective
from configs.dpo import DpoLoss
from configs.grpo import ObjectiveConfig
from configs.lora import LoraConfig
from configs.model import AnyDtype
from configs.reward_model import PairwiseLoss, PointwiseLoss
from configs.sft import MtpConfig
from configs.train import OptimizerConfig, TrainerConfig
from rollout.checkpoint import resolve_dtype

Objective = ObjectiveConfig | DistillObjective | DpoLoss | PairwiseLoss | PointwiseLoss | None
"""GRPO's, distillation's, DPO's, a reward model's, or None for supervised training."""
PEAK = "memory/peak_gib"
"""Metric: peak memory of the fullest rank in a step."""
LONGEST = "memory/longest_tokens"
"""Metric: tokens of that rank's longest micro-batch in the step."""


class FrozenModel(NamedTuple):
    """A checkpoint that is loaded beside the trained model and never changes, and its precision."""

    model: Path
    dtype: AnyDtype


@dataclass(frozen=True)
class TrainSpec:
    """Everything that a rank needs to build its engine; sent to it by value.

    dtype: precision of the weights; `auto` becomes the checkpoint's.
    chat_template: the file that replaces the checkpoint's template. with_reference: keep a frozen copy of `model`, or
    of the checkpoint `reference`, sharded under ZeRO-3. teachers: frozen models by name, of which one at a time takes
    the reference's place. routing_replay: the policy must have routers that can replay
    routes. head_seed: seed of a reward model's new head; training itself draws no random numbers. balance: balance of
    the experts' load, None to only measure it. mtp: train the checkpoint's MTP modules, or new ones; None removes them,
    from exports too. lora: train adapters alone; the reference is then the policy without them. Raises ValueError for
    impossible combinations.
    """

    model: Path
    dtype: AnyDtype
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    total_steps: int
    chat_template: str | None = None
    objective: Objective = None
    with_reference: bool = False
    reference: Path | None = None
    teachers: dict[str, FrozenModel] = field(default_factory=dict[str, FrozenModel])
    routing_replay: bool = False
    head_seed: int = 0
    balance: V2Balance | V3Balance | None = None
    mtp: MtpConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", resolve_dtype(self.dtype, self.model))
        if self.optimizer.moments == "bfloat16" and self.trainer.offload and self.trainer.offload.nvme:
            raise ValueError(
                "optimizer.moments='bfloat16' can't be offloaded to NVMe, where DeepSpeed swaps float32 only; set it "
                "to float32, or remove trainer.offload.nvme"
            )

    @property
    def is_reward_model(self) -> bool:
        """True for a reward model, whose batches consist of scored trees."""
        return isinstance(self.objective, PairwiseLoss | PointwiseLoss)


@dataclass(frozen=True, slots=True)
class BatchSums:
    """A rank's part of the loss, and sums and maxima over its `count` trained tokens or comparisons (LossOutput)."""

    count: int
    loss: float
    sums: dict[str, float]
    maxima: dict[str, float]
