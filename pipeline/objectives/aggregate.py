"""How per-token terms become one number: a weight for each token, and one denominator for the whole batch.

The weight is local to a completion and the denominator is counted over the whole batch, all micro-batches and ranks;
so a sum of weighted terms over any split of the batch is the same number.
"""

from typing import Literal

Aggregation = Literal["sequence", "token", "fixed"]


def token_weight(aggregation: Aggregation, *, length: int, max_tokens: int) -> float:
    """Weight of each token of a completion of `length` tokens.

    `sequence`: 1 / length (as printed); `token`: 1 (DAPO, arXiv:2503.14476 eq. 8); `fixed`: 1 / max_tokens
    (Dr. GRPO, arXiv:2503.20783: a long completion is not discounted).
    """
    if aggregation == "sequence":
        return 1.0 / length
    return 1.0 if aggregation == "token" else 1.0 / max_tokens


def batch_denominator(aggregation: Aggregation, lengths: list[int]) -> float:
    """What the weighted sum over the batch is divided by: tokens for `token`, completions otherwise; at least 1."""
    return float(max(sum(lengths) if aggregation == "token" else len(lengths), 1))
