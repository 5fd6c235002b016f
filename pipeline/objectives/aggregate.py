"""Aggregate per-token terms to one number: a weight for each token, and one denominator for the whole batch.

The denominator is counted over all micro-batches and ranks, so every split of the batch gives the same sum.
"""

from typing import Literal

Aggregation = Literal["sequence", "token", "fixed"]


def token_weight(aggregation: Aggregation, *, length: int, max_tokens: int) -> float:
    """Return the weight of each token of a completion with `length` tokens.

    `sequence`: 1 / length (as printed); `token`: 1 (DAPO, arXiv:2503.14476 eq. 8); `fixed`: 1 / max_tokens
    (Dr. GRPO, arXiv:2503.20783: a long completion is not discounted).

    Example: `token_weight("sequence", length=4, max_tokens=512)` is 0.25.
    """
    if aggregation == "sequence":
        return 1.0 / length
    return 1.0 if aggregation == "token" else 1.0 / max_tokens


def batch_denominator(aggregation: Aggregation, lengths: list[int]) -> float:
    """Count the tokens of the batch for `token`, its completions otherwise; at least 1."""
    return float(max(sum(lengths) if aggregation == "token" else len(lengths), 1))
