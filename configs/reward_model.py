"""Reward models."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.balance import Balance
from configs.base import Settings
from configs.data import ComparisonData
from configs.lora import LoraConfig, refuse_beside_lora
from configs.model import ModelConfig
from configs.sinks import SinkNames
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig, check_length


class PairwiseLoss(Settings):
    """Bradley-Terry: -log sigmoid(r_better - r_worse - margin), the mean over the pairs of a comparison."""

    type: Literal["pairwise"]
    """Selects this loss."""
    margin: float = Field(default=0.0, ge=0)
    """Coefficient of the pair's difference of scores in the margin. 0 applies no margin."""
    center: float = Field(default=0.0, ge=0)
    """Coefficient of (r_better + r_worse)^2, a penalty that keeps the mean score near 0."""


class PointwiseLoss(Settings):
    """Regression to the answer's score, or binary cross-entropy with it."""

    type: Literal["pointwise"]
    """Selects this loss."""
    kind: Literal["regression", "bce"] = "regression"
    """`regression`: (r - score)^2. `bce`: binary cross-entropy of sigmoid(r), for scores between 0 and 1."""


class RewardModelConfig(Settings):
    """A reward model: a scalar head on a checkpoint, read at the last token of the answer (DeepSeek-V2 section 4.2)."""

    type: Literal["rm"]
    """Selects this stage."""
    model: ModelConfig
    """First weights: a language model, which gets a new head, or a reward model."""
    data: ComparisonData
    """Comparisons to learn from."""
    eval_data: dict[str, ComparisonData] = Field(default_factory=dict[str, ComparisonData])
    """Held-out comparisons by name; RewardBench's files have the form `pair`, with `columns: {domain: subset}`."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; the last step is always evaluated. Set together with eval_data."""
    loss: Annotated[PairwiseLoss | PointwiseLoss, Field(discriminator="type")] = PairwiseLoss(type="pairwise")
    """Loss."""
    comparisons_per_step: int = Field(ge=1)
    """Comparisons of one optimizer step, over all ranks."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of `steps` and `epochs` is set."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data; a step may span two passes."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    balance: Balance | None = None
    """Balance of the load of a mixture's experts. None applies none."""
    lora: LoraConfig | None = None
    """Low-rank adapters, trained instead of the weights. None trains all weights."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """DeepSpeed ranks."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints to resume from."""
    report_to: SinkNames | None = None
    """Services that get figures and samples beside TensorBoard's files. None takes `report_to` of the recipe."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order and of the head's first weights."""

    @model_validator(mode="after")
    def _sound(self) -> "RewardModelConfig":
        check_eval_names(self.eval_data, self.eval_every_steps)
        for name, data in self.eval_data.items():
            if data.reasoning != self.data.reasoning:
                raise ValueError(
                    f"eval_data.{name}.reasoning={data.reasoning}, but data.reasoning={self.data.reasoning}: a reward "
                    "model is evaluated on the text that it learns from; set both alike"
                )
        check_length(self.steps, self.epochs, self.optimizer.schedule)
        refuse_beside_lora(self.lora, self.trainer, balance=self.balance)
        if self.comparisons_per_step % self.trainer.num_ranks:
            raise ValueError(
                f"comparisons_per_step={self.comparisons_per_step} must be a multiple of "
                f"trainer.num_ranks={self.trainer.num_ranks}"
            )
        return self


def check_eval_names(eval_data: Mapping[str, ComparisonData], eval_every_steps: int) -> None:
    """Raise ValueError for a name of held-out data that can't name a file, and for evaluations without data."""
    invalid = [name for name in eval_data if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]
    if invalid:
        raise ValueError(f"eval_data: '{invalid[0]}' names files; use letters, digits, '_', '.' and '-' only")
    if not eval_data and eval_every_steps:
        raise ValueError("eval_every_steps has no effect without eval_data; set eval_data or remove it")
