"""Training batches of a GRPO step: judged groups as trees of tokens, with advantages and weights.

Shape suffixes: P prompts, G completions of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.grpo import GRPOConfig, ObjectiveConfig
from pipeline.data.prompts import Prompt
from pipeline.data.trees import Branch, Tree
from pipeline.grpo.experience import Experience
from pipeline.objectives.advantage import batch_advantage, group_advantage, has_spread, leave_one_out_advantage
from pipeline.objectives.aggregate import batch_denominator, token_weight
from rollout.types import Completion


@dataclass(frozen=True)
class TrainingBatch:
    """Trees of one optimizer step, and the denominator of their summed loss."""

    trees: list[Tree]
    denominator: float


def training_batches(experience: Experience, config: GRPOConfig) -> list[TrainingBatch]:
    """Compute the advantages and split the experience into `updates_per_batch` batches of whole groups.

    A completion without a reward, or a truncated one under overlong.mask, gets weight 0, for the KL term too, and does
    not count in the denominator. A group without spread also gets weight 0, so that its gradient is exactly zero, but
    its tokens stay in the denominator: without them the gradient would get larger the fewer groups have spread.
    """
    rewards_PG = experience.rewards_PG
    if config.mixing == "group":  # mixing has normalised these rewards within their groups
        advantages_PG = batch_advantage(rewards_PG)
    elif config.objective.baseline == "leave_one_out":
        advantages_PG = leave_one_out_advantage(rewards_PG)
    else:
        advantages_PG = group_advantage(rewards_PG, normalize_std=config.objective.normalize_std)
    spread_P = has_spread(rewards_PG)
    groups_per_update = len(experience.groups) // config.updates_per_batch
    batches: list[TrainingBatch] = []
    for first in range(0, len(experience.groups), groups_per_update):
        trees: list[Tree] = []
        counted_lengths: list[int] = []
        for p in range(first, first + groups_per_update):
            group = experience.groups[p].group
            counts_G = [
                not np.isnan(reward) and not (config.overlong.mask and completion.finish_reason == "length")
                for completion, reward in zip(group.completions, rewards_PG[p], strict=True)
            ]
            counted_lengths += [
                len(completion.token_ids)
                for completion, counts in zip(group.completions, counts_G, strict=True)
                if counts
            ]
            kl_coef = prompt_kl_coef(config.objective, experience.groups[p].prompt)
            branches = [
                _branch(completion, float(advantage), counts and bool(spread_P[p]), kl_coef, config)
                for completion, advantage, counts in zip(group.completions, advantages_PG[p], counts_G, strict=True)
            ]
            trees.append(Tree(group.prompt_ids, branches, root_experts=group.routed_experts))
        batches.append(TrainingBatch(trees, batch_denominator(config.objective.aggregation, counted_lengths)))
    return batches


def prompt_kl_coef(objective: ObjectiveConfig, prompt: Prompt) -> float:
    """Return beta for a prompt: the smallest that `kl_coef_of` sets for a reward that judges it, else `kl_coef`."""
    labels = prompt.task.kind.split() or list(objective.kl_coef_of)
    return min((objective.kl_coef_of.get(label, objective.kl_coef) for label in labels), default=objective.kl_coef)


def _branch(completion: Completion, advantage: float, trains: bool, kl_coef: float, config: GRPOConfig) -> Branch:
    length = len(completion.token_ids)
    weight = token_weight(config.objective.aggregation, length=length, max_tokens=config.sampling.max_tokens)
    columns: dict[str, Sequence[float]] = {
        "rollout_logprobs": completion.logprobs,
        "advantages": [advantage] * length,
        "weights": [weight if trains else 0.0] * length,
    }
    if config.sampling.temperature != 1:
        columns["temperature"] = [config.sampling.temperature] * length
    if config.objective.kl_coef_of:
        columns["kl_coef"] = [kl_coef] * length
    return Branch(
        completion.token_ids,
        columns,
        experts=completion.routed_experts,
    )
