"""Mix the verdicts of several rewards into one: r = sum_k c_k r_k (DeepSeek-V2 section 4.2), with metrics of the mix.

First gates cap the scores of the other rewards, then each reward's scores are normalised, then the weighted sum is
taken.

Shape suffixes: K rewards in the order of their specs, P prompts, G completions of a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.rewards import RewardSpec
from pipeline.objectives.advantage import Array, standardize
from rewards.types import Verdict

DECIMALS = 12
"""Decimals of the totals. 0.1 * 3 and 0.3 * 1 differ in the 17th, which must not count as spread within a group."""


@dataclass(frozen=True)
class MixedRewards:
    """Rewards of a step with the scores that they consist of.

    rewards_PG: NaN where a verdict that counts is not ok; the completion is then left out of its group.
    scores_KPG: scores of each reward, NaN where it gave none.
    capped_KPG: the scores after the gates, NaN also where the completion is left out.
    """

    specs: Sequence[RewardSpec]
    rewards_PG: Array
    scores_KPG: Array
    capped_KPG: Array


def mix(
    verdicts: Sequence[Sequence[Mapping[str, Verdict]]],
    specs: Sequence[RewardSpec],
    *,
    normalize: Literal["none", "batch", "group"],
) -> MixedRewards:
    """Sum every completion's scores with the rewards' weights.

    verdicts: P groups of G completions, each with its verdicts by label. A reward that did not judge a completion adds
        0. A verdict counts if its reward has a weight or a gate; others are only monitored.
    normalize: `none` takes the scores as they are. `batch` centres each reward's scores and divides them by their
        population standard deviation over all completions that are not left out; `group` does so within each group
        (GDPO, arXiv:2601.05242). GDPO then normalises the sums over the batch: `batch_advantage` does. Equal scores
        add 0.

    Where a score is below its reward's gate, all other scores of the completion that would add to the sum become 0.
    Totals are rounded to 12 decimals. Raises ValueError for groups of different sizes, a completion without verdicts,
    and a label without a spec.

    Example:
        mix([[{"math": right}, {"math": wrong}]], [RewardSpec(name="math")], normalize="none").rewards_PG  # [[1., 0.]]
    """
    sizes = {len(group) for group in verdicts}
    if len(sizes) != 1:
        raise ValueError(f"every prompt needs the same number of judged completions, got {sorted(sizes)}")
    labels = [spec.label for spec in specs]
    for by_label in (by_label for group in verdicts for by_label in group):
        _check_labels(by_label, labels)
    scores_KPG = np.array([[[_score(by_label, label) for by_label in group] for group in verdicts] for label in labels])
    failed_KPG = np.array([[[label in by_label for by_label in group] for group in verdicts] for label in labels])
    failed_KPG &= np.isnan(scores_KPG)
    counts_K = np.array([spec.weight != 0 or spec.gate is not None for spec in specs])
    left_out_PG = failed_KPG[counts_K].any(axis=0)
    capped_KPG = np.where(left_out_PG, np.nan, _cap(scores_KPG, specs))
    if normalize == "none":
        contributions_KPG = np.nan_to_num(capped_KPG)
    else:
        contributions_KPG = standardize(capped_KPG, axis=2 if normalize == "group" else (1, 2))
    weights_K = np.array([spec.weight for spec in specs])
    totals_PG = np.round(np.tensordot(weights_K, contributions_KPG, axes=1), DECIMALS)
    return MixedRewards(specs, np.where(left_out_PG, np.nan, totals_PG), scores_KPG, capped_KPG)


def shape_overlong(lengths_PG: ArrayLike, *, max_tokens: int, shaping_tokens: int) -> Array:
    """Compute the soft overlong penalty to add to the rewards (DAPO, equation 13); float64 of the same shape.

    lengths_PG: tokens of each completion, of any shape. The penalty is 0 up to max_tokens - shaping_tokens, then linear
    down to -1 at max_tokens and beyond. shaping_tokens = 0 gives no penalty.
    """
    lengths_PG = np.asarray(lengths_PG, dtype=np.float64)
    if shaping_tokens == 0:
        return np.zeros_like(lengths_PG)
    return np.clip((max_tokens - shaping_tokens - lengths_PG) / shaping_tokens, -1.0, 0.0)


def mix_metrics(mixed: MixedRewards, lengths_PG: ArrayLike) -> dict[str, float]:
    """Compute correlations between rewards and lengths, and rates of gates and ties, over all ok verdicts.

    * `reward/<label>/corr_length`: Pearson's correlation of the scores with lengths_PG, the completions' tokens.
    * `reward/<label>/corr/<other>`: correlation with the scores of each reward whose spec comes later.
    * `reward/<label>/gated_rate`: share of a gating reward's scores below its gate.
    * `reward/total/collapsed_rate`: among the pairs of a group's completions with different scores of some weighted
      reward after the gates, the share with equal totals, which the objective can't tell apart.

    An undefined metric, such as the correlation with a constant, is absent.
    """
    lengths_PG = np.asarray(lengths_PG, dtype=np.float64)
    metrics: dict[str, float] = {}
    for spec, scores_PG in zip(mixed.specs, mixed.scores_KPG, strict=True):
        metrics[f"reward/{spec.label}/corr_length"] = _correlation(scores_PG, lengths_PG)
        if spec.gate is not None:
            metrics[f"reward/{spec.label}/gated_rate"] = _share(scores_PG < spec.gate, ~np.isnan(scores_PG))
    for (spec, a_PG), (other, b_PG) in combinations(zip(mixed.specs, mixed.scores_KPG, strict=True), 2):
        metrics[f"reward/{spec.label}/corr/{other.label}"] = _correlation(a_PG, b_PG)
    metrics["reward/total/collapsed_rate"] = _collapsed_rate(mixed)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _check_labels(by_label: Mapping[str, Verdict], labels: Sequence[str]) -> None:
    if not by_label:
        raise ValueError("a completion without a verdict: no reward judged its task")
    for label in by_label:
        if label not in labels:
            raise ValueError(f"a verdict of reward '{label}', which is not configured; configured: {', '.join(labels)}")


def _score(by_label: Mapping[str, Verdict], label: str) -> float:
    verdict = by_label.get(label)
    return np.nan if verdict is None or verdict.score is None else verdict.score


def _cap(scores_KPG: Array, specs: Sequence[RewardSpec]) -> Array:
    """Apply the gates to the scores; NaN stays NaN and passes every gate."""
    weights_K11 = np.array([spec.weight for spec in specs])[:, None, None]
    gains_KPG = weights_K11 * scores_KPG > 0  # with a negative weight, the negative scores add to the sum
    capped_KPG = scores_KPG.copy()
    for k, spec in enumerate(specs):
        if spec.gate is not None:
            others_K11 = np.arange(len(specs))[:, None, None] != k
            capped_KPG[others_K11 & gains_KPG & (scores_KPG[k] < spec.gate)] = 0.0
    return capped_KPG


def _correlation(a_PG: Array, b_PG: Array) -> float:
    """Pearson's correlation where both are numbers; NaN for fewer than two, or if one is constant."""
    both_PG = ~np.isnan(a_PG) & ~np.isnan(b_PG)
    if not both_PG.any():
        return np.nan
    a, b = standardize(a_PG[both_PG], axis=0), standardize(b_PG[both_PG], axis=0)
    return float((a * b).mean()) if a.any() and b.any() else np.nan


def _share(part_PG: NDArray[np.bool_], whole_PG: NDArray[np.bool_]) -> float:
    return float((part_PG & whole_PG).sum() / whole_PG.sum()) if whole_PG.any() else np.nan


def _collapsed_rate(mixed: MixedRewards) -> float:
    """Compute the rate described in `mix_metrics`; NaN if no pair differs."""
    judged_PG = ~np.isnan(mixed.rewards_PG)
    differ_PGG = np.zeros((*judged_PG.shape, judged_PG.shape[1]), dtype=bool)
    for spec, capped_PG in zip(mixed.specs, np.nan_to_num(mixed.capped_KPG), strict=True):
        if spec.weight:
            differ_PGG |= capped_PG[:, :, None] != capped_PG[:, None, :]
    differ_PGG &= judged_PG[:, :, None] & judged_PG[:, None, :]
    return _share(mixed.rewards_PG[:, :, None] == mixed.rewards_PG[:, None, :], differ_PGG)
