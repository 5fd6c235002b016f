"""One step's rollouts, judged: from prompts to trees that can be trained on.

Groups are handed to the rewards as they finish, while others are still being sampled. Where dynamic sampling is on,
groups whose rewards are all equal are replaced by groups of other prompts, as many rounds as the budget allows.

Legend: P prompts, G completions of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.trees import Branch, Tree
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.mix import DECIMALS, mix, shape_overlong, statistics
from pipeline.objectives.advantage import batch_advantage, group_advantage, has_spread
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.reports.report import Sample
from rewards.types import Verdict
from rollout.types import Completion, Group

Rewards = NDArray[np.float64]

GRAM = 4
"""Tokens of a phrase whose repetition is counted."""


@dataclass(frozen=True)
class JudgedGroup:
    """G completions of a prompt, each with its verdicts by reward."""

    prompt: Prompt
    group: Group
    verdicts: list[dict[str, Verdict]]

    @property
    def lengths_G(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion.token_ids) for completion in self.group.completions]


@dataclass(frozen=True)
class Experience:
    """P judged groups; rewards_PG is NaN where a completion could not be judged."""

    judged: list[JudgedGroup]
    rewards_PG: Rewards

    def samples(self) -> list[Sample]:
        """What a person reads: one sample a completion."""
        return [
            Sample(judged.prompt.task.prompt, completion.text, completion.finish_reason, float(reward), verdicts)
            for judged, rewards_G in zip(self.judged, self.rewards_PG, strict=True)
            for completion, verdicts, reward in zip(judged.group.completions, judged.verdicts, rewards_G, strict=True)
        ]


def collect(config: GRPOConfig, prompts: Prompts, fleet: Fleet, step: int) -> tuple[Experience, dict[str, float]]:
    """Sample and judge until P groups have spread or the rounds are used up; always exactly P groups.

    The round decides which prompts are drawn and the seed they are sampled with, so a resumed run draws the same.
    Rewards are mixed, and figures taken, over everything that was sampled.
    """
    num_prompts, max_rounds = config.prompts_per_step, config.dynamic_sampling.max_rounds
    drawn: list[JudgedGroup] = []
    metrics: dict[str, float] = {}
    rewards_PG = totals_PG = np.empty((0, config.group_size))
    spread_P = np.empty(0, bool)
    for draw in range((step - 1) * max_rounds + 1, step * max_rounds + 1):
        drawn += _sample(config, prompts.take(draw, num_prompts), fleet, seed=config.seed * 1_000_003 + draw)
        lengths_PG = np.array([judged.lengths_G for judged in drawn])
        rewards_PG, totals_PG, metrics = mixed_rewards(config, [judged.verdicts for judged in drawn], lengths_PG)
        spread_P = has_spread(rewards_PG)
        if spread_P.sum() >= num_prompts:
            break
    useful_first = np.argsort(~spread_P, kind="stable")[:num_prompts]
    metrics |= _statistics(drawn, totals_PG) | {
        "rollout/sampled_groups": float(len(spread_P)),
        "rollout/mixed_groups_rate": float(spread_P.mean()),
    }
    experience = Experience([drawn[row] for row in useful_first], rewards_PG[useful_first])
    return experience, metrics | fleet.rewards.metrics() | fleet.rollout.metrics()


def _sample(config: GRPOConfig, prompts: list[Prompt], fleet: Fleet, *, seed: int) -> list[JudgedGroup]:
    groups: dict[int, Group] = {}
    ids = [prompt.token_ids for prompt in prompts]
    for group in fleet.rollout.generate(ids, config.sampling.of_policy(), config.group_size, seed):
        groups[group.index] = group
        task = prompts[group.index].task
        fleet.rewards.submit(group.index, task, [completion.text for completion in group.completions])
    verdicts = fleet.rewards.gather()
    return [JudgedGroup(prompt, groups[i], verdicts[i]) for i, prompt in enumerate(prompts)]


def mixed_rewards(
    config: GRPOConfig, verdicts: list[list[dict[str, Verdict]]], lengths_PG: NDArray[np.int64]
) -> tuple[Rewards, Rewards, dict[str, float]]:
    """rewards_PG with the punishment for overlong completions; the same totals before any normalisation, under which
    every step's mean would be 0 and no trend would show; and what the mix looks like in numbers."""
    mixed = mix(verdicts, config.rewards, normalize=config.mixing)
    punishment_PG = shape_overlong(
        lengths_PG, max_tokens=config.sampling.max_tokens, shaping_tokens=config.overlong.shaping_tokens
    )
    rewards_PG = np.round(mixed.rewards_PG + punishment_PG, DECIMALS)
    metrics = statistics(mixed, lengths_PG)
    totals_PG = rewards_PG
    if config.mixing != "none":
        weights_K = np.array([spec.weight for spec in config.rewards])
        totals_PG = np.tensordot(weights_K, np.nan_to_num(mixed.capped_KPG), axes=1) + punishment_PG
        totals_PG[np.isnan(rewards_PG)] = np.nan
    slope = length_slope(totals_PG, lengths_PG)
    return rewards_PG, totals_PG, metrics if slope is None else metrics | {"reward/total/length_slope": slope}


def length_slope(rewards_PG: ArrayLike, lengths_PG: ArrayLike) -> float | None:
    """What a token more is worth within a group: the slope of the rewards in the lengths, both less their group's mean.

    Between groups a hard prompt has long answers and low rewards, which says nothing of length. NaN takes no part. None
    where no group has two lengths.
    """
    judged_PG = ~np.isnan(np.asarray(rewards_PG, dtype=np.float64))
    count_P1 = np.maximum(judged_PG.sum(axis=1, keepdims=True), 1)
    rewards_PG, lengths_PG = (
        np.where(judged_PG, values_PG - np.where(judged_PG, values_PG, 0.0).sum(axis=1, keepdims=True) / count_P1, 0.0)
        for values_PG in (np.asarray(rewards_PG, dtype=np.float64), np.asarray(lengths_PG, dtype=np.float64))
    )
    spread = (lengths_PG**2).sum()
    return float((lengths_PG * rewards_PG).sum() / spread) if spread > 1e-9 else None


def _statistics(drawn: list[JudgedGroup], rewards_PG: Rewards) -> dict[str, float]:
    """Figures of everything a step sampled. The entropy, in nats a token, is estimated by what was sampled: the mean of
    -log p, whose expectation it is."""
    completions = [completion for judged in drawn for completion in judged.group.completions]
    judged = rewards_PG[~np.isnan(rewards_PG)]
    return {
        "reward/total/mean": float(judged.mean()) if judged.size else float("nan"),
        "reward/total/std": float(judged.std()) if judged.size else float("nan"),
        "reward/total/left_out_rate": 1 - judged.size / rewards_PG.size,
        "rollout/length/mean": float(np.mean([len(completion.token_ids) for completion in completions])),
        "rollout/truncated_rate": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "rollout/entropy_mean": -float(np.mean([p for completion in completions for p in completion.logprobs])),
        "rollout/repetition_rate": float(np.mean([repetition_rate(c.token_ids) for c in completions])),
    }


def repetition_rate(token_ids: Sequence[int]) -> float:
    """Share of a completion's 4-grams of token ids that it has said before; 0 for one without any."""
    grams = list(zip(*(token_ids[shift:] for shift in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """One step's metrics of its updates: the largest of what is named `_max`, the mean of the rest."""
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([update[name] for update in updates]))
        for name in updates[0]
    }


@dataclass(frozen=True)
class TrainingBatch:
    """Trees to train on in one update, and what their loss is divided by."""

    trees: list[Tree]
    denominator: float


def training_batches(experience: Experience, config: GRPOConfig) -> list[TrainingBatch]:
    """The experience as `updates_per_batch` batches of whole groups.

    Left out with weight 0, divergence included: completions without a judged reward and, under overlong.mask, those
    that did not end; these don't count in the denominator. A group without spread has weight 0 too, so its gradient is
    exactly zero, but it counts: leaving it out would make the step larger the fewer groups can teach.
    """
    if config.mixing == "group":  # the rewards are centred and scaled within their groups already
        advantages_PG = batch_advantage(experience.rewards_PG)
    else:
        advantages_PG = group_advantage(experience.rewards_PG, normalize_std=config.objective.normalize_std)
    spread_P = has_spread(experience.rewards_PG)
    per_update = len(experience.judged) // config.updates_per_batch
    batches = []
    for first in range(0, len(experience.judged), per_update):
        trees, counted = [], []
        for row in range(first, first + per_update):
            group = experience.judged[row].group
            counts_G = [
                not np.isnan(reward) and not (config.overlong.mask and completion.finish_reason == "length")
                for completion, reward in zip(group.completions, experience.rewards_PG[row], strict=True)
            ]
            counted += [len(c.token_ids) for c, counts in zip(group.completions, counts_G, strict=True) if counts]
            branches = [
                _branch(completion, float(advantage), counts and bool(spread_P[row]), config)
                for completion, advantage, counts in zip(group.completions, advantages_PG[row], counts_G, strict=True)
            ]
            trees.append(Tree(group.prompt_ids, branches, root_experts=group.routed_experts))
        batches.append(TrainingBatch(trees, batch_denominator(config.objective.aggregation, counted)))
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
