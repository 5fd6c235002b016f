"""Balancing the load of a mixture's experts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings


class V2Balance(Settings):
    """DeepSeek-V2's balance, for gates with softmax scores: three losses and dropped tokens (sections 2.2.3, 2.2.4)."""

    type: Literal["v2"]
    """Selects this balance."""
    expert: float = Field(default=0.003, ge=0)
    """Factor of the loss that evens the load of experts."""
    device: float = Field(default=0.05, ge=0)
    """Factor of the loss that evens the load of groups of experts; the model must have groups (`n_group`)."""
    communication: float = Field(default=0.02, ge=0)
    """Factor of the loss that evens the tokens that groups receive; the model must have groups."""
    capacity: float | None = Field(default=1.0, gt=0)
    """Most tokens that a group of experts takes from the micro-batches of all ranks that share it, as a multiple of an
    even share; training drops the rest, which is neither sent nor computed. Where several ranks share the experts
    (`trainer.expert_parallel_size`), each must hold one group (`n_group`). None drops nothing."""
    never_dropped: float = Field(default=0.1, ge=0, le=1)
    """Share of the sequences that never lose a token. Has an effect only with `capacity`."""

    @model_validator(mode="after")
    def _has_effect(self) -> "V2Balance":
        if self.capacity is None and not (self.expert or self.device or self.communication):
            raise ValueError("capacity=null and all factors 0 balance nothing; remove the block")
        return self


class V3Balance(Settings):
    """DeepSeek-V3's balance, for gates with a bias (`noaux_tc`): the bias follows the load, with a small loss within
    each sequence (section 2.1.2)."""

    type: Literal["v3"]
    """Selects this balance."""
    bias_rate: float = Field(default=0.001, ge=0)
    """Change of an expert's bias in a step: up below the mean load, down above it."""
    sequence: float = Field(default=1e-4, ge=0)
    """Factor of the loss that evens the load within each sequence."""

    @model_validator(mode="after")
    def _has_effect(self) -> "V3Balance":
        if not (self.bias_rate or self.sequence):
            raise ValueError("bias_rate=0 and sequence=0 balance nothing; remove the block")
        return self


Balance = Annotated[V2Balance | V3Balance, Field(discriminator="type")]
