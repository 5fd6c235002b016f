"""From verdicts to the rewards of the groups: r = sum_k c_k r_k (DeepSeek-V2 section 4.2).

Shape suffixes: P prompts, G completions of a prompt.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.types import Verdict


def mix(verdicts: Sequence[Sequence[Mapping[str, Verdict]]], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """The weighted sum of every completion's scores.

    verdicts: P groups of G completions, each with its verdicts by reward. weights: the coefficient c of each reward;
    one of weight 0 is only watched.

    Returns rewards_PG, float64, NaN where a verdict that counts is not ok, which leaves that completion out of its
    group. Raises ValueError for groups of different sizes, a completion without verdicts, and a reward without a
    weight.
    """
    sizes = {len(group) for group in verdicts}
    if len(sizes) != 1:
        raise ValueError(f"every prompt needs the same number of judged completions, got {sorted(sizes)}")
    return np.array([[_total(judged, weights) for judged in group] for group in verdicts], dtype=np.float64)


def shape_overlong(lengths_PG: ArrayLike, *, max_tokens: int, shaping_tokens: int) -> NDArray[np.float64]:
    """The soft overlong punishment to add to the rewards (DAPO, equation 13).

    lengths_PG: tokens of each completion, of any shape. 0 up to max_tokens - shaping_tokens, from there linear down to
    -1 at max_tokens and beyond. shaping_tokens = 0 punishes nothing. Returns float64 of the same shape.
    """
    lengths_PG = np.asarray(lengths_PG, dtype=np.float64)
    if shaping_tokens == 0:
        return np.zeros_like(lengths_PG)
    return np.clip((max_tokens - shaping_tokens - lengths_PG) / shaping_tokens, -1.0, 0.0)


def _total(judged: Mapping[str, Verdict], weights: Mapping[str, float]) -> float:
    """sum_k c_k r_k of one completion, or NaN."""
    if not judged:
        raise ValueError("a completion without a verdict: no reward judged its task")
    total = 0.0
    for name, verdict in judged.items():
        if name not in weights:
            raise ValueError(f"no weight for reward '{name}'; weights are given for {', '.join(weights)}")
        if weights[name]:
            total += weights[name] * (np.nan if verdict.score is None else verdict.score)
    return total
