"""On-policy distillation from several teachers (DeepSeek-V4)."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import PromptData
from configs.grpo import AlarmName, ValidationConfig
from configs.model import ModelConfig
from configs.sampling import CompletionConfig, RolloutConfig, SyncConfig, fit_prompts, refuse_bounds
from configs.sinks import SinkNames
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig


class TeacherConfig(Settings):
    """A frozen model that the student learns from."""

    model: ModelConfig
    """Checkpoint of the teacher. Its tokenizer must be the student's; its architecture may be another."""
    domains: list[str] = Field(default_factory=list[str])
    """Values of `domain_column` whose rows this teacher teaches. Empty: the teacher's own name."""
    weight: float = Field(default=1.0, gt=0)
    """Factor w of the teacher's divergence in the loss."""


class DistillObjective(Settings):
    """The divergence from the teachers on the student's own completions."""

    form: Literal["full", "sampled"] = "full"
    """`full`: the exact reverse divergence over the whole vocabulary at every token. `sampled`: its estimate from the
    sampled token alone, as a policy gradient with the advantage log pi_T - log pi_S; cheaper, and of high variance."""
    aggregation: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens. `sequence`: mean over a completion's tokens, then over completions."""


class DistillConfig(Settings):
    """On-policy distillation: a student samples, and frozen teachers say at each of its tokens what they would have
    sampled."""

    type: Literal["distill"]
    """Selects this stage."""
    model: ModelConfig
    """First weights of the student."""
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    """Teachers by name. One at a time is in memory, so more of them cost loading time only."""
    domain_column: str | None = None
    """Column of the rows that selects their teacher. None: every teacher teaches every row."""
    prompts: PromptData
    """Prompts. `truth` and `reward` have no effect, since nothing is judged."""
    steps: int = Field(ge=1)
    """Rollout batches, each sampled, learned from in one update and followed by a weight sync."""
    prompts_per_step: int = Field(ge=1)
    """Prompts P of one step."""
    group_size: int = Field(default=1, ge=1)
    """Completions G of one prompt."""
    routing_replay: Literal["none", "rollout"] = "none"
    """Routes of the student that training replays: `rollout`, the engine's from sampling (R3). Teachers route for
    themselves."""
    sampling: CompletionConfig
    """End of the completions."""
    objective: DistillObjective = Field(default_factory=DistillObjective)
    """Loss."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """DeepSpeed ranks of the student; teachers are laid out like it."""
    rollout: RolloutConfig
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
        """Return whether the student is evaluated after `step`."""
        return self.validation is not None and self.validation.is_due(step, self.steps)

    def teachers_of(self, domain: str | None) -> list[str]:
        """Return the names of the teachers of a row with `domain` in its domain_column; of all rows for None."""
        return [
            name for name, teacher in self.teachers.items() if domain is None or domain in (teacher.domains or [name])
        ]

    @model_validator(mode="after")
    def _sound(self) -> "DistillConfig":
        for name, teacher in self.teachers.items():
            if teacher.domains and self.domain_column is None:
                raise ValueError(f"teachers.{name}.domains has no effect without domain_column; set it or remove them")
            if teacher.model.chat_template is not None:
                raise ValueError(
                    f"teachers.{name}.model.chat_template has no effect, since a teacher reads the student's tokens; "
                    "remove it"
                )
        if len(self.teachers) == 1 and next(iter(self.teachers.values())).weight != 1:
            raise ValueError("teachers: the weight of a single teacher has no effect; change the learning rate instead")
        if self.prompts.reward is not None:
            raise ValueError("prompts.reward has no effect, since nothing is judged; remove it (see domain_column)")
        fit_prompts(self.prompts, self.sampling, self.rollout)
        if self.prompts_per_step * self.group_size < self.trainer.num_ranks:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} x group_size={self.group_size} completions are fewer than "
                f"trainer.num_ranks={self.trainer.num_ranks}; lower num_ranks"
            )
        refuse_bounds(self.sync, self.model.dtype, self.trainer, self.rollout)
        return self
