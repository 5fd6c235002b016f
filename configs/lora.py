"""Low-rank adapters."""

from typing import Literal

from pydantic import Field, model_validator

from configs.balance import V2Balance, V3Balance
from configs.base import Settings
from configs.train import TrainerConfig


class LoraConfig(Settings):
    """Low-rank adapters (LoRA, arXiv:2106.09685): the weights W stay, and W + (alpha / rank) B A is trained through A
    and B. Routed experts, routers, embeddings and norms have no adapters. There is no dropout, which a resume could not
    repeat."""

    rank: int = Field(ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale: alpha / rank multiplies B A."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers with adapters, by the end of their names, such as `q_proj`; `all-linear` takes all of the decoder's
    layers except routers. Attention and MLPs are linear layers, also MLA's projections and shared experts; routed
    experts are not."""
    start: str | None = None
    """Folder of adapters in the form of `peft` to start from; a stage with `lora` writes them to `hf/adapter`, and
    `stage:NAME` takes those of a stage. None draws A, by the same seed in every run, and B is 0."""

    @model_validator(mode="after")
    def _has_targets(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError("lora.targets=[] trains nothing; name linear layers, or set all-linear")
        return self


def refuse_beside_lora(
    lora: LoraConfig | None, trainer: TrainerConfig, *, balance: V2Balance | V3Balance | None = None, mtp: bool = False
) -> None:
    """Raise ValueError for settings of a stage that adapters can't be trained with."""
    if lora is None:
        return
    for key, used, remedy in (
        ("trainer.fp8=true", trainer.fp8, "set it to false"),
        (
            f"trainer.expert_parallel_size={trainer.expert_parallel_size}",
            trainer.expert_parallel_size > 1,
            "set it to 1; zero_stage 3 shards frozen experts too",
        ),
        ("balance", balance is not None, "remove it: routers and experts don't learn"),
        ("mtp or mtp_weight", mtp, "remove it: modules for multi-token prediction have no adapters"),
    ):
        if used:
            raise ValueError(f"{key} can't be combined with lora; {remedy}, or remove lora")
