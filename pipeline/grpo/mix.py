"""From verdicts to the rewards of the groups: r = sum_k c_k r_k (DeepSeek-V2 section 4.2), and how its parts relate.

In this order: a gate caps what other rewards gave, every reward's scores are normalised, the weighted sum is taken.

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
"""Digits that totals keep: 0.1 * 3 and 0.3 * 1 differ in the 17th, and a group of only these has no spread."""


@dataclass(frozen=True)
class Mixed:
    """The rewards of a step and what they are made of.

    rewards_PG: NaN where a verdict that counts is not ok, which leaves that completion out of its group.
    scores_KPG: what the rewards said, NaN where they said nothing. capped_KPG: the same behind the gates, and NaN too
    where the completion is left out.
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
) -> Mixed:
    """The weighted sum of every completion's scores.

    verdicts: P groups of G completions, each with its verdicts by label. A reward that did not judge a completion
    contributes 0 to it. One of weight 0 is only watched, or only a gate. A verdict counts if its reward has a weight or
    a gate.

    Gates: where a score is below its reward's `gate`, every other score of the completion that would add to the sum
    becomes 0.

    normalize: `none` takes the scores as they are. `batch` centres each reward's scores and divides them by their
    standard deviation (the population's) over all completions that are not left out, `group` over those of the
    completion's own group (GDPO, arXiv:2601.05242; its last step, normalising the sums over the batch, is the
    advantage's). Where all of them are equal the reward contributes 0.

    Totals are rounded to 12 decimals.

    Raises ValueError for groups of different sizes, a completion without verdicts, and a label without a spec.
    """
    sizes = {len(group) for group in verdicts}
    if len(sizes) != 1:
        raise ValueError(f"every prompt needs the same number of judged completions, got {sorted(sizes)}")
    labels = [spec.label for spec in specs]
    for judged in (judged for group in verdicts for judged in group):
        _check_labels(judged, labels)
    scores_KPG = np.array([[[_score(judged, label) for judged in group] for group in verdicts] for label in labels])
    unknown_KPG = np.array([[[label in judged for judged in group] for group in verdicts] for label in labels])
    unknown_KPG &= np.isnan(scores_KPG)
    counts_K = np.array([spec.weight != 0 or spec.gate is not None for spec in specs])
    left_out_PG = unknown_KPG[counts_K].any(axis=0)
    capped_KPG = np.where(left_out_PG, np.nan, _cap(scores_KPG, specs))
    if normalize == "none":
        contributions_KPG = np.nan_to_num(capped_KPG)
    else:
        contributions_KPG = standardize(capped_KPG, axis=2 if normalize == "group" else (1, 2))
    weights_K = np.array([spec.weight for spec in specs])
    totals_PG = np.round(np.tensordot(weights_K, contributions_KPG, axes=1), DECIMALS)
    return Mixed(specs, np.where(left_out_PG, np.nan, totals_PG), scores_KPG, capped_KPG)


def shape_overlong(lengths_PG: ArrayLike, *, max_tokens: int, shaping_tokens: int) -> Array:
    """The soft overlong punishment to add to the rewards (DAPO, equation 13).

    lengths_PG: tokens of each completion, of any shape. 0 up to max_tokens - shaping_tokens, from there linear down to
    -1 at max_tokens and beyond. shaping_tokens = 0 punishes nothing. Returns float64 of the same shape.
    """
    lengths_PG = np.asarray(lengths_PG, dtype=np.float64)
    if shaping_tokens == 0:
        return np.zeros_like(lengths_PG)
    return np.clip((max_tokens - shaping_tokens - lengths_PG) / shaping_tokens, -1.0, 0.0)


def statistics(mixed: Mixed, lengths_PG: ArrayLike) -> dict[str, float]:
    """How the rewards of a step relate, over all completions with an ok verdict, left out or not.

    * `reward/<label>/corr_length`: Pearson's correlation of the score with lengths_PG, the completions' tokens.
    * `reward/<label>/corr/<other>`: with the score of a reward whose spec comes later, where both are ok.
    * `reward/<label>/gated_rate`: share of a gating reward's scores that are below its gate.
    * `reward/total/collapsed_rate`: of the pairs of completions in a group that some reward with a weight tells apart
      behind the gates, the share whose totals are equal: to the objective they are the same.

    A figure that is not defined, such as the correlation with a constant, is absent.
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


def _check_labels(judged: Mapping[str, Verdict], labels: Sequence[str]) -> None:
    if not judged:
        raise ValueError("a completion without a verdict: no reward judged its task")
    for label in judged:
        if label not in labels:
            raise ValueError(f"a verdict of reward '{label}', which is not configured; configured: {', '.join(labels)}")


def _score(judged: Mapping[str, Verdict], label: str) -> float:
    verdict = judged.get(label)
    return np.nan if verdict is None or verdict.score is None else verdict.score


def _cap(scores_KPG: Array, specs: Sequence[RewardSpec]) -> Array:
    """The scores behind the gates; NaN stays NaN, and passes every gate."""
    weights_K11 = np.array([spec.weight for spec in specs])[:, None, None]
    gains_KPG = weights_K11 * scores_KPG > 0  # of a punishment, with its negative weight, the negative scores
    capped_KPG = scores_KPG.copy()
    for k, spec in enumerate(specs):
        if spec.gate is not None:
            others_K11 = np.arange(len(specs))[:, None, None] != k
            capped_KPG[others_K11 & gains_KPG & (scores_KPG[k] < spec.gate)] = 0.0
    return capped_KPG


def _correlation(a_PG: Array, b_PG: Array) -> float:
    """Pearson's, where both are numbers; NaN where that is fewer than two, or one of them is constant."""
    both_PG = ~np.isnan(a_PG) & ~np.isnan(b_PG)
    if not both_PG.any():
        return np.nan
    a, b = standardize(a_PG[both_PG], axis=0), standardize(b_PG[both_PG], axis=0)
    return float((a * b).mean()) if a.any() and b.any() else np.nan


def _share(some_PG: NDArray[np.bool_], of_PG: NDArray[np.bool_]) -> float:
    return float((some_PG & of_PG).sum() / of_PG.sum()) if of_PG.any() else np.nan


def _collapsed_rate(mixed: Mixed) -> float:
    """See `statistics`. NaN where no pair differs."""
    judged_PG = ~np.isnan(mixed.rewards_PG)
    differ_PGG = np.zeros((*judged_PG.shape, judged_PG.shape[1]), dtype=bool)
    for spec, capped_PG in zip(mixed.specs, np.nan_to_num(mixed.capped_KPG), strict=True):
        if spec.weight:
            differ_PGG |= capped_PG[:, :, None] != capped_PG[:, None, :]
    differ_PGG &= judged_PG[:, :, None] & judged_PG[:, None, :]
    return _share(mixed.rewards_PG[:, :, None] == mixed.rewards_PG[:, None, :], differ_PGG)
