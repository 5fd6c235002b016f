"""Metrics of one GRPO step: lengths, entropy, repetition and truncation of its completions, and means over updates.

Shape suffixes: P prompts, G completions of a prompt.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pipeline.objectives.advantage import Array
from rollout.types import Completion

GRAM = 4
"""Length of the n-grams whose repetition is counted, in tokens."""


def reward_figures(rewards_PG: Array) -> dict[str, float]:
    """Compute mean and deviation of a step's rewards, and the share of completions without one."""
    judged_rewards_N = rewards_PG[~np.isnan(rewards_PG)]
    return {
        "reward/total/mean": float(judged_rewards_N.mean()) if judged_rewards_N.size else float("nan"),
        "reward/total/std": float(judged_rewards_N.std()) if judged_rewards_N.size else float("nan"),
        "reward/total/left_out_rate": 1 - judged_rewards_N.size / rewards_PG.size,
    }


def rollout_figures(completions: Sequence[Completion]) -> dict[str, float]:
    """Compute the metrics of all completions of a step. The entropy, in nats per token, is estimated by the mean of
    -log p over the sampled tokens."""
    kept = [completion.kept_tokens.counts for completion in completions if completion.kept_tokens is not None]
    return {
        "rollout/length/mean": float(np.mean([len(completion.token_ids) for completion in completions])),
        "rollout/truncated_rate": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "rollout/entropy_mean": -float(np.mean([p for completion in completions for p in completion.logprobs])),
        "rollout/repetition_rate": float(np.mean([repetition_rate(c.token_ids) for c in completions])),
    } | ({"rollout/kept_tokens_mean": float(np.concatenate(kept).mean())} if kept else {})


def length_slope(rewards_PG: ArrayLike, lengths_PG: ArrayLike) -> float | None:
    """Fit the reward of one more token: the slope of rewards over lengths, both centred within their group.

    Centring removes the prompt's difficulty: a hard prompt has long answers and low rewards. NaN rewards are left out.
    None if no group has two different lengths.
    """
    judged_PG = ~np.isnan(np.asarray(rewards_PG, dtype=np.float64))
    count_P1 = np.maximum(judged_PG.sum(axis=1, keepdims=True), 1)
    rewards_PG, lengths_PG = (
        np.where(judged_PG, values_PG - np.where(judged_PG, values_PG, 0.0).sum(axis=1, keepdims=True) / count_P1, 0.0)
        for values_PG in (np.asarray(rewards_PG, dtype=np.float64), np.asarray(lengths_PG, dtype=np.float64))
    )
    spread = (lengths_PG**2).sum()
    return float((lengths_PG * rewards_PG).sum() / spread) if spread > 1e-9 else None


def repetition_rate(token_ids: Sequence[int]) -> float:
    """Share of a completion's 4-grams of token ids that occur earlier in it; 0 for fewer than 4 tokens."""
    grams = list(zip(*(token_ids[shift:] for shift in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Combine the metrics of a step's updates: the maximum of those named `_max`, the mean of the others."""
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([update[name] for update in updates]))
        for name in updates[0]
    }
