"""Training batches of a GRPO step: judged groups as trees of tokens, with advantages and weights.

Shape suffixes: P prompts, G completions of a prompt.
"""

from dataclasses import dataclass

import numpy as np

from configs.grpo import GRPOConfig
from pipeline.data.trees import Branch, Tree
from pipeline.grpo.experience import Experience
from pipeline.objectives.advantage import batch_advantage, group_advantage, has_spread
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
            branches = [
                _branch(completion, float(advantage), counts and bool(spread_P[p]), config)
                for completion, advantage, counts in zip(group.completions, advantages_PG[p], counts_G, strict=True)
            ]
            trees.append(Tree(group.prompt_ids, branches, root_experts=group.routed_experts))
        batches.append(TrainingBatch(trees, batch_denominator(config.objective.aggregation, counted_lengths)))
    return batches


def _branch(completion: Completion, advantage: float, trains: bool, config: GRPOConfig) -> Branch:
    length = len(completion.token_ids)
    weight = token_weight(config.objective.aggregation, length=length, max_tokens=config.sampling.max_tokens)
    return Branch(
        completion.token_ids,
        {
            "rollout_logprobs": completion.logprobs,
            "advantages": [advantage] * length,
            "weights": [weight if trains else 0.0] * length,
        },
        experts=completion.routed_experts,
    )
