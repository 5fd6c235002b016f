"""A recipe's training stage as the planner sees it: its model and the work of one step."""

from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from configs.distill import DistillConfig
from configs.dpo import DPOConfig
from configs.grpo import GRPOConfig
from configs.model import FirstModelConfig, ModelConfig
from configs.references import PREFIX
from configs.reward_model import RewardModelConfig
from configs.sampling import RolloutConfig
from configs.sft import SFTConfig
from configs.stages import ON_POLICY, AnyStage, Recipe
from configs.train import TrainerConfig
from pipeline.cluster.demand import stage_demand
from pipeline.planner.architecture import Architecture, architecture_of, as_reward_model
from pipeline.planner.cost import Work

TrainedStage = SFTConfig | RewardModelConfig | DPOConfig | GRPOConfig | DistillConfig
PLANNED = (SFTConfig, RewardModelConfig, DPOConfig, GRPOConfig, DistillConfig)
"""Stages with a step of known size. The data decide how much the other stages sample."""


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A training stage, reduced to the settings that its memory and time depend on."""

    model: Architecture
    work: Work
    batch_size: int
    """Prompts, texts or comparisons of one update, which the number of ranks must divide."""
    trainer: TrainerConfig
    moments: Literal["float32", "bfloat16"]
    rollout: RolloutConfig | None
    reference: Architecture | None
    """The frozen model beside the trained one: a copy of it as reference, which adapters do without, or the largest
    teacher."""
    separate: bool
    """True if the engines have other devices than the ranks."""
    judge_devices: int
    """Devices reserved for models that judge."""
    steps: int | None
    predictable: bool
    """True if the memory model covers the stage: it has no figures for FP8 training and multi-token prediction."""


def planned_stage(
    config: TrainedStage,
    recipe: Recipe,
    *,
    mean_share: float,
    model_config: str | None = None,
) -> PlannedStage:
    """Reduce a training stage of `recipe` to what the planner needs.

    mean_share: mean length of prompts, completions and texts as a share of the longest that the stage allows.
    model_config: a config.json to plan with instead of the stage's own model.
    """
    lora = None if isinstance(config, DistillConfig) else config.lora
    model = architecture_of(model_config or origin_of(config, recipe), dtype_of(config, recipe), lora)
    frozen: list[Architecture] = []  # teachers, or the reference
    if isinstance(config, DistillConfig):
        teachers = [teacher.model for teacher in config.teachers.values()]
        frozen = [architecture_of(model_config or _origin(t, recipe), _dtype(t, recipe)) for t in teachers]
    elif isinstance(config, GRPOConfig) and config.objective.kl_coef > 0:
        frozen = [model]
    demand = stage_demand(config, recipe)
    return PlannedStage(
        model=as_reward_model(model) if isinstance(config, RewardModelConfig) else model,
        work=_work(config, mean_share, fmean([other.active / model.active for other in frozen] or [0.0])),
        batch_size=_batch_size(config),
        trainer=config.trainer,
        moments=config.optimizer.moments,
        rollout=config.rollout if isinstance(config, ON_POLICY) else None,
        reference=max(frozen, key=lambda other: other.total * other.width, default=None) if lora is None else None,
        separate=demand.separate,
        judge_devices=demand.judge_gpus,
        steps=config.steps,
        predictable=not (config.trainer.fp8 or getattr(config, "mtp", None) or getattr(config, "mtp_weight", 0)),
    )


def origin_of(config: AnyStage, recipe: Recipe) -> str:
    """Return the checkpoint, hub name or architecture that the chain of stages before this one starts from."""
    model = config.candidate if config.type == "gate" else config.model
    assert model is not None
    return _origin(model, recipe)


def _origin(model: ModelConfig | FirstModelConfig, recipe: Recipe) -> str:
    if isinstance(model, FirstModelConfig) and model.init_config is not None:
        return model.init_config
    path = str(model.path)
    return origin_of(recipe.stages[path.removeprefix(PREFIX)], recipe) if path.startswith(PREFIX) else path


def dtype_of(config: AnyStage, recipe: Recipe) -> str:
    """Return the precision of a stage's model. `auto` is that of the stage whose result the model is, float32 for a new
    model, and remains `auto` for another checkpoint."""
    model = config.candidate if config.type == "gate" else config.model
    assert model is not None
    return _dtype(model, recipe)


def _dtype(model: ModelConfig | FirstModelConfig, recipe: Recipe) -> str:
    if model.dtype != "auto":
        return model.dtype
    if model.path is None:
        return "float32"
    name = model.path.removeprefix(PREFIX)
    return dtype_of(recipe.stages[name], recipe) if name != model.path else "auto"


def _batch_size(config: TrainedStage) -> int:
    match config:
        case SFTConfig():
            return config.conversations_per_step
        case RewardModelConfig() | DPOConfig():
            return config.comparisons_per_step
        case GRPOConfig():
            return config.prompts_per_step // config.updates_per_batch
        case DistillConfig():
            return config.prompts_per_step * config.group_size


def _work(config: TrainedStage, share: float, scored: float) -> Work:
    match config:
        case SFTConfig():
            longest = config.data.max_length
            return Work(config.conversations_per_step, 1, 0, share * longest, longest, longest)
        case RewardModelConfig() | DPOConfig():
            longest = config.data.max_length
            mean = 1.5 * share * longest  # a prompt and two answers, each half as long as `max_length` allows
            return Work(config.comparisons_per_step, 1, 0, mean, 2 * longest, 2 * longest)
        case GRPOConfig() | DistillConfig():
            max_tokens, max_prompt = config.sampling.max_tokens, config.prompts.max_prompt_length
            updates = config.updates_per_batch if isinstance(config, GRPOConfig) else 1
            return Work(
                prompts=config.prompts_per_step,
                group_size=config.group_size,
                prompt_tokens=share * max_prompt,
                mean_tokens=max_tokens if config.sampling.ignore_eos else share * max_tokens,
                max_tokens=max_tokens,
                longest=max_prompt + max_tokens,
                scored=scored + (updates > 1),
                updates=updates,
            )
