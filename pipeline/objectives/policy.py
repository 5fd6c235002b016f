"""The GRPO objective in the factors of the equation: ratio, surrogate, divergence, aggregate (DeepSeek-V2 eq. 32-33).

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(ratio A_i, clip(ratio, 1 - low, 1 + high) A_i) - beta D_KL ) ]

Every tensor is flat over the trained tokens of a micro-batch, so nothing is padded; `sequence_N` says which completion
a token belongs to. Sums are divided by denominators that the caller counted over all micro-batches and ranks, so the
way a batch is split can't change its gradient.

Legend: N trained tokens of the micro-batch, S completions of the micro-batch.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LARGEST_EXPONENT = 80.0
"""Largest log-ratio that is exponentiated: float32 ends at e^88, and infinity times a gradient of 0 is NaN."""


class LossOutput(NamedTuple):
    """A loss to back-propagate, and metrics that add up over micro-batches and ranks.

    `sums` are sums over tokens, or over a reward model's comparisons, to be divided by the global number of trained
    tokens or comparisons; `maxima` combine by maximum.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


def importance_ratio(
    *,
    logprobs_N: Tensor,
    policy_logprobs_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    level: Literal["token", "sequence"],
) -> Tensor:
    """pi_theta / pi_theta_old, float [N].

    `token`: each token its own (as printed). `sequence`: the geometric mean over the completion, the same for all its
    tokens, with the gradient through that mean (GSPO, arXiv:2507.18071 eq. 7). A ratio past e^LARGEST_EXPONENT is that
    number, without a gradient.
    """
    log_ratio_N = logprobs_N - policy_logprobs_N
    if level == "token":
        return _quotient(log_ratio_N)
    zeros_S = log_ratio_N.new_zeros(num_sequences)
    lengths_S = zeros_S.index_add(0, sequence_N, torch.ones_like(log_ratio_N))
    mean_S = zeros_S.index_add(0, sequence_N, log_ratio_N) / lengths_S.clamp(min=1)
    return _quotient(mean_S)[sequence_N]


def clipped_surrogate(*, ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A), float [N] (PPO's, arXiv:1707.06347 eq. 7)."""
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def cispo_surrogate(
    *, ratio_N: Tensor, advantages_N: Tensor, logprobs_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """stop_gradient(clip(ratio)) A log pi, float [N]: no token loses its gradient (CISPO, arXiv:2506.13585 eq. 4)."""
    return ratio_N.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_N * logprobs_N


def k3_divergence(*, logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """D_KL(pi_theta || pi_ref) = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1, float [N], never negative (eq. 33)."""
    log_ratio_N = ref_logprobs_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


def importance_weight(*, policy_logprobs_N: Tensor, rollout_logprobs_N: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_rollout, cap), float [N], no gradient: truncated importance sampling for the gap between
    the engine that sampled and the engine that trains."""
    return (policy_logprobs_N - rollout_logprobs_N).exp().clamp(max=cap)


def mismatch(gap_N: Tensor, sequence_N: Tensor, num_sequences: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far rollout and trainer disagree on the same weights, gap_N = log pi - log mu of every token before any mask:
    sums, and the maxima over tokens and over what a sequence's tokens sum to."""
    absolute_N = gap_N.abs()
    sums = {"mismatch/abs_mean": absolute_N.sum(), "mismatch/k3_mean": (_quotient(gap_N) - gap_N - 1).sum()}
    sequences = absolute_N.new_zeros(num_sequences).index_add_(0, sequence_N, absolute_N)
    return sums, {"mismatch/abs_max": absolute_N.max(), "mismatch/sequence_max": sequences.max()}


def grpo_loss(
    *,
    logprobs_N: Tensor,
    policy_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    ref_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    denominator: float,
    clip_low: float,
    clip_high: float,
    ratio: Literal["token", "sequence"],
    surrogate: Literal["clip", "cispo"],
    kl_coef: float,
    importance_cap: float | None,
) -> LossOutput:
    """-J of one micro-batch, a scalar, with its metrics.

    logprobs_N carries the gradient; policy_logprobs_N are the same tokens under the policy before this batch's first
    update. weights_N and denominator are the aggregation (see objectives.aggregate): loss = sum(weights * per_token) /
    denominator. A weight of 0 takes a token out, divergence included, whatever its log-probabilities are; metrics are
    over all tokens.
    """
    trained_N = weights_N != 0
    every_N, every_policy_N = logprobs_N.detach(), policy_logprobs_N
    # Masked before the exponential: the weight 0 times a number that overflowed is NaN.
    logprobs_N, policy_logprobs_N = (torch.where(trained_N, x, 0.0) for x in (logprobs_N, policy_logprobs_N))
    shape: dict[str, Any] = {"sequence_N": sequence_N, "num_sequences": num_sequences, "level": ratio}
    ratio_N = importance_ratio(logprobs_N=logprobs_N, policy_logprobs_N=policy_logprobs_N, **shape)
    if surrogate == "clip":
        objective_N = clipped_surrogate(
            ratio_N=ratio_N, advantages_N=advantages_N, clip_low=clip_low, clip_high=clip_high
        )
    else:
        objective_N = cispo_surrogate(
            ratio_N=ratio_N, advantages_N=advantages_N, logprobs_N=logprobs_N, clip_low=clip_low, clip_high=clip_high
        )
    if importance_cap is not None:
        objective_N = objective_N * importance_weight(
            policy_logprobs_N=every_policy_N, rollout_logprobs_N=rollout_logprobs_N, cap=importance_cap
        )
    sums, maxima = mismatch(every_policy_N - rollout_logprobs_N, sequence_N, num_sequences)
    if ref_logprobs_N is not None:
        kl_N = k3_divergence(logprobs_N=logprobs_N, ref_logprobs_N=torch.where(trained_N, ref_logprobs_N, 0.0))
        objective_N = objective_N - kl_coef * kl_N
        every_log_ratio_N = ref_logprobs_N - every_N
        sums["loss/kl_mean"] = (_quotient(every_log_ratio_N) - every_log_ratio_N - 1).sum()
    loss = -(weights_N * torch.where(trained_N, objective_N, 0.0)).sum() / denominator
    ratio_N = importance_ratio(logprobs_N=every_N, policy_logprobs_N=every_policy_N, **shape)
    sums |= {
        "loss/ratio_mean": ratio_N.sum(),
        "loss/ratio_clipped_mean": ((ratio_N < 1 - clip_low) | (ratio_N > 1 + clip_high)).float().sum(),
        "loss/surprisal_mean": -every_N.sum(),
    }
    return LossOutput(loss, sums, maxima)


def _quotient(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=LARGEST_EXPONENT).exp()
