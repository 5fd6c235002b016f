"""What a stage asks of a plan: its model, and the work of one step."""

from dataclasses import dataclass
from typing import Literal

from configs.grpo import GRPOConfig
from configs.model import FirstModelConfig
from configs.references import PREFIX
from configs.reward_model import RewardModelConfig
from configs.sampling import RolloutConfig
from configs.sft import SFTConfig
from configs.stages import AnyStage, Recipe
from configs.train import TrainerConfig
from pipeline.cluster.demand import stage_demand
from pipeline.planner.architecture import Architecture, architecture_of, as_reward_model
from pipeline.planner.cost import Work

PLANNED = (SFTConfig, RewardModelConfig, GRPOConfig)
"""Stages whose step has a known size; how much the others sample, their data decide."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A stage as the planner sees it."""

    model: Architecture
    dtype: str
    work: Work
    divided: int
    """What the number of ranks must divide: the prompts, texts or comparisons of an update."""
    trainer: TrainerConfig
    moments: Literal["float32", "bfloat16"]
    rollout: RolloutConfig | None
    reference: bool
    judges: int
    """Devices that models which judge keep for themselves."""
    steps: int | None


def asked_of(config: AnyStage, recipe: Recipe, *, mean_share: float, model_config: str | None = None) -> Asked:
    """What a stage of `recipe` that is one of PLANNED asks.

    mean_share: mean length of prompts, completions and texts as a share of the longest that the stage allows; the data
    decide it, and nobody has seen them yet. model_config: a config.json to plan with instead of the stage's own.
    """
    assert isinstance(config, PLANNED)
    model = architecture_of(model_config or origin_of(config, recipe))
    if isinstance(config, RewardModelConfig):
        model = as_reward_model(model)
    judges = sum(group.gpus for group in stage_demand(config, recipe).actors if not group.colocated)
    work, divided = _work(config, mean_share)
    policy = isinstance(config, GRPOConfig)
    return Asked(
        model=model,
        dtype=config.model.dtype,
        work=work,
        divided=divided,
        trainer=config.trainer,
        moments=config.optimizer.moments,
        rollout=config.rollout if policy else None,
        reference=policy and config.objective.kl_coef > 0,
        judges=int(-(-judges // 1)),
        steps=config.steps,
    )


def origin_of(config: AnyStage, recipe: Recipe) -> str:
    """The checkpoint, hub name or architecture that a stage's model was first made of."""
    model = config.candidate if config.type == "gate" else config.model
    assert model is not None
    if isinstance(model, FirstModelConfig) and model.init_config is not None:
        return model.init_config
    path = str(model.path)
    return origin_of(recipe.stages[path.removeprefix(PREFIX)], recipe) if path.startswith(PREFIX) else path


def _work(config: SFTConfig | RewardModelConfig | GRPOConfig, share: float) -> tuple[Work, int]:
    match config:
        case SFTConfig():
            longest = config.data.max_length
            work = Work(config.conversations_per_step, 1, 0, share * longest, longest, longest)
            return work, config.conversations_per_step
        case RewardModelConfig():
            longest = config.data.max_length  # half of it prompt, which both answers share
            half = share * longest / 2
            return Work(config.comparisons_per_step, 2, half, half, longest, longest), config.comparisons_per_step
        case GRPOConfig():
            most, asked = config.sampling.max_tokens, config.prompts.max_prompt_length
            updates = config.updates_per_batch
            scored = (config.objective.kl_coef > 0) + (updates > 1)
            mean = most if config.sampling.ignore_eos else share * most
            work = Work(
                config.prompts_per_step, config.group_size, share * asked, mean, most, asked + most, scored, updates
            )
            return work, config.prompts_per_step // updates
