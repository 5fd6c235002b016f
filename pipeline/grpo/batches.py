"""Training batches of a GRPO step: its judged groups as trees of tokens, with advantages and weights.

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
    """The trees of one optimizer step, and the number that their summed loss is divided by."""

    trees: list[Tree]
    denominator: float


def training_batches(experience: Experience, config: GRPOConfig) -> list[TrainingBatch]:
    """Split the experience into `updates_per_batch` batches of whole groups.

    Completions without a judged reward and, under overlong.mask, truncated ones get weight 0, for the KL term too, and
    do not count in the denominator. The completions of a group without spread get weight 0 as well, so that their
    gradient is exactly zero, but they count: otherwise a step would be the larger the fewer groups teach something.
    """
    rewards_PG = experience.rewards_PG
    if config.mixing == "group":  # these rewards are centred and scaled within their groups already
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
