"""Group-relative advantages: GRPO's baseline is the mean of the group (DeepSeek-V2 eq. 34; DeepSeekMath 4.1.2).

Legend: P prompts, G completions of a prompt. A reward of NaN means that the completion could not be judged.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def standardize(scores: ArrayLike, *, axis: int | tuple[int, ...]) -> Array:
    """Compute (r - mean) / std of the scores along `axis`; float64 of the same shape.

    std is the population's. NaN scores are left out of mean and std. They, and scores that are all equal, become
    exactly 0. Equality is tested exactly, because rounding would give equal scores a standard deviation of 1e-17.

    Example: `standardize([[1.0, 0.0]], axis=1)` is `[[1.0, -1.0]]`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    centred = _centre(scores, axis)
    count = np.maximum((~np.isnan(scores)).sum(axis=axis, keepdims=True), 1)
    std = np.sqrt((centred**2).sum(axis=axis, keepdims=True) / count)
    return np.where(std > 0, centred / np.where(std > 0, std, 1.0), 0.0)  # differences below 1e-160 vanish when squared


def has_spread(rewards_PG: Array) -> NDArray[np.bool_]:
    """Return bool [P]: True for groups in which two judged rewards differ, compared exactly."""
    return _spread(rewards_PG, axis=1)[:, 0]


def group_advantage(rewards_PG: Array, *, normalize_std: bool) -> Array:
    """Compute A_i = (r_i - mean r) / std r over the judged completions of each group; float64 [P, G].

    std is the population's (over G, not G - 1). `normalize_std=False` leaves the division out (Dr. GRPO,
    arXiv:2503.20783). Unjudged completions and groups of equal rewards get exactly 0.

    Example: rewards `[[1.0, 0.0, 0.0, 0.0]]` give `[[0.75, -0.25, -0.25, -0.25]]` with `normalize_std=False`.
    """
    return standardize(rewards_PG, axis=1) if normalize_std else _centre(rewards_PG, axis=1)


def leave_one_out_advantage(rewards_PG: Array) -> Array:
    """Compute A_i = r_i - mean of the other judged rewards of the group; float64 [P, G] (RLOO, arXiv:2402.14740).

    Unjudged completions, groups of equal rewards and the only judged completion of a group get exactly 0.

    Example: rewards `[[1.0, 0.0, 0.0, 0.0]]` give `[[1.0, -1/3, -1/3, -1/3]]`.
    """
    judged_P1 = (~np.isnan(rewards_PG)).sum(axis=1, keepdims=True)
    return _centre(rewards_PG, axis=1) * judged_P1 / np.maximum(judged_P1 - 1, 1)


def batch_advantage(rewards_PG: Array) -> Array:
    """Standardize over all judged completions of a step; float64 [P, G].

    This is the last step of GDPO (arXiv:2601.05242), whose rewards are already normalised within their groups. std is
    the population's. Unjudged completions and groups of equal rewards get exactly 0.
    """
    return np.where(has_spread(rewards_PG)[:, None], standardize(rewards_PG, axis=(0, 1)), 0.0)


def _spread(scores: Array, axis: int | tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where two scores along `axis` differ; reduced axes are kept with length 1."""
    judged = ~np.isnan(scores)
    lowest = np.where(judged, scores, np.inf).min(axis=axis, keepdims=True)
    return np.where(judged, scores, -np.inf).max(axis=axis, keepdims=True) > lowest


def _centre(scores: Array, axis: int | tuple[int, ...]) -> Array:
    """Subtract the mean of the judged scores; NaN and equal scores become exactly 0."""
    judged = ~np.isnan(scores)
    count = np.maximum(judged.sum(axis=axis, keepdims=True), 1)
    mean = np.where(judged, scores, 0.0).sum(axis=axis, keepdims=True) / count
    return np.where(judged & _spread(scores, axis), scores - mean, 0.0)
