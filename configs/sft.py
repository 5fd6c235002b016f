"""Supervised fine-tuning."""

from typing import Literal

from pydantic import Field, model_validator

from configs.balance import Balance
from configs.base import Settings
from configs.data import ConversationData
from configs.lora import LoraConfig, refuse_beside_lora
from configs.model import FirstModelConfig
from configs.sinks import SinkNames
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig, check_length


class MtpConfig(Settings):
    """Multi-token prediction (DeepSeek-V3 section 2.2): modules that predict further ahead, trained with the model, for
    speculative decoding. Needs a DeepSeek-V3 model; one without modules gets new ones."""

    weight: float = Field(default=0.3, gt=0)
    """Factor of the modules' mean loss: 0.3 in DeepSeek-V3's first 10T tokens, then 0.1."""
    depth: int = Field(default=1, ge=1)
    """Number of modules; module k predicts the k-th token after the next. Must be the checkpoint's, if it has any."""
    detached: bool = False
    """Train the modules alone: their gradient does not reach the model, its embedding or its head. Under AdamW the
    weight then only counts in the clipped gradient norm."""


class SFTConfig(Settings):
    """Supervised fine-tuning: masked cross-entropy on packed conversations."""

    type: Literal["sft"]
    """Selects this stage."""
    model: FirstModelConfig
    """First weights."""
    data: ConversationData
    """Conversations to learn from."""
    eval_data: ConversationData | None = None
    """Held-out conversations for the evaluation loss. None measures none."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluation losses; the last step is always measured. Set together with eval_data."""
    conversations_per_step: int = Field(ge=1)
    """Conversations of one optimizer step, over all ranks."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of `steps` and `epochs` is set."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data; a step may span two passes."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    mtp: MtpConfig | None = None
    """Modules for multi-token prediction. None leaves them out, of the result too."""
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
    """Seed of the data order."""

    @model_validator(mode="after")
    def _sound(self) -> "SFTConfig":
        check_length(self.steps, self.epochs, self.optimizer.schedule)
        refuse_beside_lora(self.lora, self.trainer, balance=self.balance, mtp=self.mtp is not None)
        if self.eval_data is None and self.eval_every_steps:
            raise ValueError("eval_every_steps has no effect without eval_data; set eval_data or remove it")
        if self.conversations_per_step % self.trainer.num_ranks:
            raise ValueError(
                f"conversations_per_step={self.conversations_per_step} must be a multiple of "
                f"trainer.num_ranks={self.trainer.num_ranks}"
            )
        return self
