"""Training batches of a GRPO step: judged groups as trees of tokens, with advantages and weights.

Shape suffixes: P prompts, G completions of a prompt.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.grpo import GRPOConfig, ObjectiveConfig
from pipeline.data.prompts import Prompt
from pipeline.data.trees import Tree, stored_tree
from pipeline.grpo.experience import Experience
from pipeline.objectives.advantage import batch_advantage, group_advantage, has_spread, leave_one_out_advantage
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.objectives.control import NO_COEFFICIENTS, Coefficients


@dataclass(frozen=True)
class TrainingBatch:
    """Trees of one optimizer step, and the denominator of their summed loss."""

    trees: list[Tree]
    denominator: float


def training_batches(
    experience: Experience, config: GRPOConfig, step: int, coefficients: Coefficients = NO_COEFFICIENTS
) -> list[TrainingBatch]:
    """Compute the advantages and split the experience of `step` into `updates_per_batch` batches (see `split_updates`).

    A completion without a reward, or a truncated one under overlong.mask, gets weight 0, for the KL term too, and does
    not count in the denominator. A group without spread also gets weight 0, so that its gradient is exactly zero, but
    its tokens stay in the denominator: without them the gradient would get larger the fewer groups have spread.
    coefficients: those of this step that the objective adapts.
    """
    rewards_PG = experience.rewards_PG
    if config.mixing == "group":  # mixing has normalised these rewards within their groups
        advantages_PG = batch_advantage(rewards_PG)
    elif config.objective.baseline == "leave_one_out":
        advantages_PG = leave_one_out_advantage(rewards_PG)
    else:
        advantages_PG = group_advantage(rewards_PG, normalize_std=config.objective.normalize_std)
    spread_P = has_spread(rewards_PG)
    num_prompts, group_size = rewards_PG.shape
    random_seed = (config.seed, step) if config.split == "completions" else None
    updates_PG = split_updates(num_prompts, group_size, config.updates_per_batch, random_seed)
    of_step = _step_columns(experience, config, step, coefficients)
    batches: list[TrainingBatch] = []
    for update in range(config.updates_per_batch):
        trees: list[Tree] = []
        counted_lengths: list[int] = []
        for p, judged in enumerate(experience.groups):
            group = judged.group
            of_group = of_step
            if config.objective.kl_coef_of:
                of_group = of_step | {"kl_coef": prompt_kl_coef(config.objective, judged.prompt)}
            columns: dict[int, dict[str, float]] = {}
            for g in np.flatnonzero(updates_PG[p] == update).tolist():
                completion = group.completions[g]
                cut_short = config.overlong.mask and completion.finish_reason == "length"
                counts = not np.isnan(rewards_PG[p, g]) and not cut_short
                if counts:
                    counted_lengths.append(completion.num_tokens)
                weight = token_weight(
                    config.objective.aggregation, length=completion.num_tokens, max_tokens=config.sampling.max_tokens
                )
                trains = counts and bool(spread_P[p])
                columns[g] = {"advantages": float(advantages_PG[p, g]), "weights": weight if trains else 0.0} | of_group
            if columns:
                trees.append(stored_tree(group, columns))
        batches.append(TrainingBatch(trees, batch_denominator(config.objective.aggregation, counted_lengths)))
    return batches


def split_updates(
    num_prompts: int, group_size: int, num_updates: int, random_seed: tuple[int, int] | None
) -> NDArray[np.int64]:
    """Return the update [P, G] that trains each completion: as many completions for each update.

    Without a seed, whole groups in their order. With one, completions at random, whatever their group (DeepSeek-R1
    section 2.1: 8,192 outputs in 16 mini-batches).
    """
    places = np.arange(num_prompts * group_size)
    if random_seed is not None:
        places = np.random.default_rng(random_seed).permutation(places)
    return (places * num_updates // len(places)).reshape(num_prompts, group_size)


def prompt_kl_coef(objective: ObjectiveConfig, prompt: Prompt) -> float:
    """Return beta for a prompt: the smallest that `kl_coef_of` sets for a reward that judges it, else `kl_coef`."""
    labels = prompt.task.kind.split() or list(objective.kl_coef_of)
    return min((objective.kl_coef_of.get(label, objective.kl_coef) for label in labels), default=objective.kl_coef)


def _step_columns(
    experience: Experience, config: GRPOConfig, step: int, coefficients: Coefficients
) -> dict[str, float]:
    """Return the columns that have one value for all tokens of a step, by name."""
    columns: dict[str, float] = {}
    if config.rollout.max_lag:
        columns["version"] = step - 1
    if config.sampling.temperature != 1:
        columns["temperature"] = config.sampling.temperature
    if coefficients.kl is not None:
        columns["kl_coef"] = coefficients.kl
    if coefficients.entropy:
        columns["entropy_coef"] = coefficients.entropy
        columns["entropy_baseline"] = experience.metrics["rollout/entropy_mean"]
    return columns
