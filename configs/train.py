"""The training engine: optimizer, schedule, ranks, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings


class ConstantSchedule(Settings):
    """A linear warm-up, then the peak learning rate throughout."""

    type: Literal["constant"]
    """Selects this schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""


class CosineSchedule(Settings):
    """A linear warm-up, then half a cosine down to `final_share` of the peak at the last step."""

    type: Literal["cosine"]
    """Selects this schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    final_share: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""


class StepDecaySchedule(Settings):
    """A linear warm-up, then a factor at each milestone (DeepSeek-V2 section 3.1.2: 0.316 at 60 % and 90 %)."""

    type: Literal["step_decay"]
    """Selects this schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    factor: float = Field(default=0.316, gt=0, lt=1)
    """Factor of the learning rate at each milestone."""
    milestones: list[float] = Field(default=[0.6, 0.9], min_length=1)
    """Milestones as shares of all steps, ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> "StepDecaySchedule":
        if sorted(set(self.milestones)) != self.milestones or not all(0 < share < 1 for share in self.milestones):
            raise ValueError("milestones must ascend and lie between 0 and 1")
        return self


Schedule = Annotated[ConstantSchedule | CosineSchedule | StepDecaySchedule, Field(discriminator="type")]


class OptimizerConfig(Settings):
    """AdamW and its learning rate."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay rates of the first and second moment."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision of AdamW's moments. `bfloat16` halves their memory, as in DeepSeek-V3; master weights stay float32."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; a larger one is scaled down."""
    schedule: Schedule = Field(default_factory=lambda: ConstantSchedule(type="constant"))
    """Schedule of the learning rate."""

    @model_validator(mode="after")
    def _moments_move(self) -> "OptimizerConfig":
        if self.moments == "bfloat16" and max(self.betas) > 1 - 2**-8:
            raise ValueError(
                f"moments='bfloat16' stand still with betas={self.betas}: the change of one step is rounded away; set "
                "betas of 0.996 at most, or moments: float32"
            )
        return self


def check_length(steps: int | None, epochs: int | None, schedule: Schedule) -> None:
    """Raise ValueError unless exactly one of steps and epochs is set, and the warm-up ends within the steps."""
    if (steps is None) == (epochs is None):
        raise ValueError("set exactly one of 'steps' and 'epochs'")
    if steps is not None and schedule.warmup_steps >= steps:
        raise ValueError(f"optimizer.schedule.warmup_steps={schedule.warmup_steps} never ends within steps={steps}")


def num_steps(steps: int | None, epochs: int | None, *, rows: int, rows_per_step: int) -> int:
    """Return the number of optimizer steps: `steps`, or those of `epochs` passes over `rows`, rounded up."""
    return steps or -(-rows * (epochs or 1) // rows_per_step)


class OffloadConfig(Settings):
    """Offload of the optimizer's master weights, moments and gradients from the GPUs to their machine."""

    parameters: bool = False
    """Offload the weights too; they are fetched layer by layer. Needs zero_stage 3."""
    nvme: str | None = None
    """Folder on an NVMe drive of each machine, used instead of its memory. Needs zero_stage 3."""


class TrainerConfig(Settings):
    """DeepSpeed ranks."""

    num_ranks: int = Field(default=1, ge=1)
    """Training processes, each a Ray actor: one for each GPU, or one for a few CPU cores."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one rank; 0 divides the machine's cores among its ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, which shards over ranks: 1 the optimizer, 2 gradients too, 3 weights too."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the routed experts of a layer, each holding a part of them (DeepSpeed's AutoEP). Divides
    `num_ranks` and the model's experts; needs zero_stage >= 1 and a model of DeepSeek-V2, DeepSeek-V3,
    Qwen2-MoE, Qwen3-MoE or Mixtral."""
    micro_batch_tokens: int = Field(default=8192, ge=16)
    """Tokens of one forward pass of one rank. Sequences are packed up to it. A longer group of completions is cut into
    rows that each repeat its prompt; a longer sequence runs alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    fp8: bool = False
    """Multiply in FP8 as DeepSeek-V3 does: projections of attention and MLPs, and experts, forward and backward.
    Weights and optimizer keep their precision. Faster on Hopper GPUs; elsewhere a slower reference computes the same
    result."""
    deterministic: bool | Literal["auto"] = "auto"
    """Train with kernels that sum in a fixed order, so that a resumed run repeats the series to the bit. `auto` does on
    CPUs, where it costs 1 %, and not on GPUs, where attention, scatter and routing get slower."""
    offload: OffloadConfig | None = None
    """Offload from GPUs: less memory, a longer update. `{}` moves the optimizer to the machine's memory. Needs GPUs and
    zero_stage >= 1."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time for a training call; after it the run stops with the reason."""
    max_restarts: int = Field(default=2, ge=0)
    """Times that the stage starts again from its newest checkpoint, or from its start, after the process of a rank
    ended, or a node was lost with engines' GPUs or with completions that no rank had read; one more stops the run."""
    start_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Longest time for the ranks to start and load their model: about its size on the disk divided by the disk's speed,
    and a minute."""

    @model_validator(mode="after")
    def _has_effect(self) -> "TrainerConfig":
        if self.offload is not None and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage >= 1")
        if self.offload is not None and self.zero_stage < 3 and (self.offload.parameters or self.offload.nvme):
            key = "parameters=true" if self.offload.parameters else f"nvme='{self.offload.nvme}'"
            raise ValueError(f"offload.{key} needs zero_stage 3, and it is {self.zero_stage}; set it to 3 or remove it")
        if self.num_ranks % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size={self.expert_parallel_size} must divide num_ranks={self.num_ranks}: every rank "
                "belongs to one set of ranks that hold all experts"
            )
        if self.expert_parallel_size > 1 and self.zero_stage == 0:
            raise ValueError("expert_parallel_size > 1 needs zero_stage >= 1: set zero_stage to 1, 2 or 3")
        return self


class CheckpointConfig(Settings):
    """Checkpoints that a run can resume from."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between checkpoints of the whole training state; the last step always has one."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep; older ones are removed."""
