"""Supervised fine-tuning."""

from typing import Literal

from pydantic import Field, model_validator

from configs.balance import Balance
from configs.base import Settings
from configs.data import ConversationData
from configs.model import FirstModelConfig
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig, check_length


class MtpConfig(Settings):
    """Multi-token prediction (DeepSeek-V3 section 2.2): modules that guess further ahead, trained beside the model, for
    speculative decoding. Needs a DeepSeek-V3 model; one that has no modules yet gets new ones."""

    weight: float = Field(default=0.3, gt=0)
    """What the modules' mean loss is multiplied by: 0.3 in DeepSeek-V3's first 10T tokens, then 0.1."""
    depth: int = Field(default=1, ge=1)
    """Modules: module k predicts the token k after the next. As many as the checkpoint has, if it has any."""
    detached: bool = False
    """Train the modules alone: nothing of their loss reaches the model, its embedding and its head. Under AdamW their
    weight then only says how much they count in the gradient's norm that is clipped."""


class SFTConfig(Settings):
    """Supervised fine-tuning: masked cross-entropy on packed conversations."""

    type: Literal["sft"]
    """Selects this stage."""
    model: FirstModelConfig
    """Where training starts."""
    data: ConversationData
    """What is learned."""
    eval_data: ConversationData | None = None
    """Held-out conversations for the evaluation loss. None measures none."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluation losses; 0 measures only after the last. Set together with eval_data."""
    conversations_per_step: int = Field(ge=1)
    """Conversations of one optimizer step, over all ranks."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of `steps` and `epochs` is set."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data, the last incomplete step of each carried into the next."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    mtp: MtpConfig | None = None
    """Modules for multi-token prediction. None leaves them out, of the result too."""
    balance: Balance | None = None
    """How the load of a mixture's experts is kept even. None leaves the gates to the loss."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """The DeepSpeed ranks."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """How often the stage can be resumed from."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order."""

    @model_validator(mode="after")
    def _sound(self) -> "SFTConfig":
        check_length(self.steps, self.epochs, self.optimizer.schedule)
        if self.eval_data is None and self.eval_every_steps:
            raise ValueError("eval_every_steps has no effect without eval_data; set eval_data or remove it")
        if self.conversations_per_step % self.trainer.num_ranks:
            raise ValueError(
                f"conversations_per_step={self.conversations_per_step} must be a multiple of "
                f"trainer.num_ranks={self.trainer.num_ranks}"
            )
        return self
