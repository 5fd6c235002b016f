"""Direct preference optimization."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import ComparisonData
from configs.lora import LoraConfig, refuse_beside_lora
from configs.model import ModelConfig
from configs.reward_model import check_eval_names
from configs.sinks import SinkNames
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig, check_length


class DpoLoss(Settings):
    """Loss of a pair of answers, of h = log pi/pi_ref(better) - log pi/pi_ref(worse)."""

    kind: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """`sigmoid`: -log sigmoid(beta h), DPO. `robust`: unbiased where a share of the pairs has the wrong order. `hinge`:
    max(0, 1 - beta h). `ipo`: (h - 1/(2 beta))^2."""
    beta: float = Field(default=0.1, gt=0)
    """Factor of h: the larger, the closer the policy stays to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to have the wrong order, for `sigmoid` (cDPO) and `robust`."""
    length_normalized: bool = False
    """Divide an answer's log pi/pi_ref by its number of tokens. For `ipo`, TRL does and the paper does not; h is then
    smaller by that factor, so beta means something else."""
    reference_free: bool = False
    """Take pi_ref as uniform, so that h is the difference of log pi. Nothing then keeps the policy near its start."""

    @model_validator(mode="after")
    def _effective(self) -> "DpoLoss":
        if self.kind == "robust" and not self.label_smoothing:
            raise ValueError("loss.kind=robust is sigmoid with label_smoothing=0; set label_smoothing above 0")
        if self.kind in ("hinge", "ipo") and self.label_smoothing:
            raise ValueError(f"loss.label_smoothing has no effect on kind={self.kind}; remove it")
        return self


class DPOConfig(Settings):
    """Direct preference optimization (arXiv:2305.18290): a policy learns from comparisons without a reward model."""

    type: Literal["dpo"]
    """Selects this stage."""
    model: ModelConfig
    """First weights of the policy, which are the reference."""
    data: ComparisonData
    """Comparisons to learn from."""
    eval_data: dict[str, ComparisonData] = Field(default_factory=dict[str, ComparisonData])
    """Held-out comparisons by name."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; the last step is always evaluated. Set together with eval_data."""
    loss: DpoLoss = Field(default_factory=DpoLoss)
    """Loss."""
    comparisons_per_step: int = Field(ge=1)
    """Comparisons of one optimizer step, over all ranks."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of `steps` and `epochs` is set."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data; a step may span two passes."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
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
    def _sound(self) -> "DPOConfig":
        check_eval_names(self.eval_data, self.eval_every_steps)
        check_length(self.steps, self.epochs, self.optimizer.schedule)
        refuse_beside_lora(self.lora, self.trainer)
        if self.lora is not None and self.lora.start is not None:
            raise ValueError(
                f"lora.start={self.lora.start} can't be combined with dpo, whose reference is the model without "
                "adapters; set model.path to the checkpoint into which they are merged, and remove lora.start"
            )
        if self.comparisons_per_step % self.trainer.num_ranks:
            raise ValueError(
                f"comparisons_per_step={self.comparisons_per_step} must be a multiple of "
                f"trainer.num_ranks={self.trainer.num_ranks}"
            )
        return self
