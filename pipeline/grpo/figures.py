"""Metrics of one GRPO step: lengths, entropy, repetition and truncation of its completions, and means over updates.

Shape suffixes: P prompts, G completions of a prompt.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pipeline.objectives.advantage import Array
from rollout.types import StoredCompletion


def reward_figures(rewards_PG: Array) -> dict[str, float]:
    """Compute mean and deviation of a step's rewards, and the share of completions without one."""
    judged_rewards_N = rewards_PG[~np.isnan(rewards_PG)]
    return {
        "reward/total/mean": float(judged_rewards_N.mean()) if judged_rewards_N.size else float("nan"),
        "reward/total/std": float(judged_rewards_N.std()) if judged_rewards_N.size else float("nan"),
        "reward/total/left_out_rate": 1 - judged_rewards_N.size / rewards_PG.size,
    }


def rollout_figures(completions: Sequence[StoredCompletion]) -> dict[str, float]:
    """Compute the metrics of all completions of a step. The entropy, in nats per token, is estimated by the mean of
    -log p over the sampled tokens."""
    num_tokens = sum(completion.num_tokens for completion in completions)
    kept = [completion.num_kept for completion in completions if completion.num_kept is not None]
    return {
        "rollout/length/mean": num_tokens / len(completions),
        "rollout/truncated_rate": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "rollout/entropy_mean": -math.fsum(completion.logprob_sum for completion in completions) / num_tokens,
        "rollout/repetition_rate": float(np.mean([completion.repetition_rate for completion in completions])),
    } | ({"rollout/kept_tokens_mean": sum(kept) / num_tokens} if kept else {})


def lag_figures(completions: Sequence[StoredCompletion], *, version: int) -> dict[str, float]:
    """Compute the lag of a step's tokens behind the weights of `version`, which they train: the mean, the largest, and
    the shares of tokens without lag and of completions that several versions sampled."""
    counts = [(version - own, count) for completion in completions for own, count in completion.version_counts]
    num_tokens = sum(count for _, count in counts)
    return {
        "rollout/lag_mean": sum(lag * count for lag, count in counts) / num_tokens,
        "rollout/lag_max": float(max(lag for lag, _ in counts)),
        "rollout/no_lag_rate": sum(count for lag, count in counts if not lag) / num_tokens,
        "rollout/several_versions_rate": float(np.mean([bool(completion.updates) for completion in completions])),
    }


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


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Combine the metrics of a step's updates: the maximum of those named `_max`, the mean of the others."""
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([update[name] for update in updates]))
        for name in updates[0]
    }
