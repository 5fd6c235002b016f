"""What goes to a training rank and what comes back: its spec, and what its passes add up to.

Free of torch, as is all that drives ranks and engines (docs/architecture.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.balance import V2Balance, V3Balance
from configs.grpo import ObjectiveConfig
from configs.reward_model import PairwiseLoss, PointwiseLoss
from configs.sft import MtpConfig
from configs.train import OptimizerConfig, TrainerConfig

PEAK = "memory/peak_gib"
"""Metric: peak memory of the fullest rank in a step."""
LONGEST = "memory/longest_tokens"
"""Metric: tokens of that rank's longest micro-batch in the step."""


@dataclass(frozen=True)
class TrainSpec:
    """All a rank needs to build its engine; crosses to the rank by value. Raises ValueError for an impossible pair.

    `chat_template` is the file that replaces the checkpoint's template, if any. `objective` is GRPO's or a reward
    model's, None for supervised training. `with_reference` keeps a frozen copy of `model` beside the policy, sharded
    over ranks under ZeRO-3. `routing_replay`: routes will be asked of the policy or come with its batches. `head_seed`
    is that of a reward model's new head; training itself draws no random numbers. `balance` evens the load of a
    mixture's experts; without, it is only measured. `mtp` trains the checkpoint's modules for multi-token prediction,
    or new ones; without, they are left out, of what is saved too.
    """

    model: Path
    dtype: Literal["float32", "bfloat16"]
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    total_steps: int
    chat_template: str | None = None
    objective: ObjectiveConfig | PairwiseLoss | PointwiseLoss | None = None
    with_reference: bool = False
    routing_replay: bool = False
    head_seed: int = 0
    balance: V2Balance | V3Balance | None = None
    mtp: MtpConfig | None = None

    def __post_init__(self) -> None:
        if self.optimizer.moments == "bfloat16" and self.trainer.offload and self.trainer.offload.nvme:
            raise ValueError(
                "optimizer.moments='bfloat16' can't be offloaded to NVMe, where DeepSpeed swaps float32 only; set it "
                "to float32, or remove trainer.offload.nvme"
            )

    @property
    def is_reward_model(self) -> bool:
        """Whether what is trained is a reward model: its batches are of scored trees."""
        return isinstance(self.objective, PairwiseLoss | PointwiseLoss)


@dataclass(frozen=True, slots=True)
class BatchSums:
    """What a rank's forward passes add up to: its part of the loss, sums and maxima over its `count` trained tokens, or
    comparisons of a reward model (see LossOutput)."""

    count: int
    loss: float
    sums: dict[str, float]
    maxima: dict[str, float]
