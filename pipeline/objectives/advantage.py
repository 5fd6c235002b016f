"""Group-relative advantages: GRPO's baseline is the group's own mean (DeepSeek-V2 eq. 34; DeepSeekMath section 4.1.2).

Legend: P prompts, G completions of a prompt. A reward of NaN means "could not be judged".
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.grpo.mix import standardize

Rewards = NDArray[np.float64]


def has_spread(rewards_PG: Rewards) -> NDArray[np.bool_]:
    """bool [P]: whether a group's judged rewards differ at all. Compared exactly: a standard deviation of equal floats
    may be 1e-17, and dividing by it would turn rounding noise into a gradient."""
    judged_PG = ~np.isnan(rewards_PG)
    lowest_P = np.where(judged_PG, rewards_PG, np.inf).min(axis=1)
    highest_P = np.where(judged_PG, rewards_PG, -np.inf).max(axis=1)
    return highest_P > lowest_P


def group_advantage(rewards_PG: Rewards, *, normalize_std: bool) -> Rewards:
    """A_i = (r_i - mean r) / std r over the judged completions of each group; float64 [P, G].

    std is the population's (over G, not G - 1). `normalize_std=False` leaves the division out (Dr. GRPO,
    arXiv:2503.20783). Unjudged completions and groups without spread get exactly 0.
    """
    if normalize_std:
        return standardize(rewards_PG, axis=1)
    judged_PG = ~np.isnan(rewards_PG)
    count_P1 = np.maximum(judged_PG.sum(axis=1, keepdims=True), 1)
    mean_P1 = np.where(judged_PG, rewards_PG, 0.0).sum(axis=1, keepdims=True) / count_P1
    return np.where(judged_PG & has_spread(rewards_PG)[:, None], rewards_PG - mean_P1, 0.0)


def batch_advantage(rewards_PG: Rewards) -> Rewards:
    """(r - mean) / std over all judged completions of a step, for rewards that are advantages within their groups
    already (GDPO, arXiv:2601.05242: normalise each reward in its group, sum, normalise the sums); float64 [P, G].

    std is the population's. Unjudged completions and groups without spread get exactly 0.
    """
    return np.where(has_spread(rewards_PG)[:, None], standardize(rewards_PG, axis=(0, 1)), 0.0)
