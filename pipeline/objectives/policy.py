"""The GRPO objective in the factors of the equation: ratio, surrogate, divergence, aggregate (DeepSeek-V2 eq. 32-33).

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(ratio A_i, clip(ratio, 1 - low, 1 + high) A_i) - beta D_KL ) ]

Tensors are flat over the trained tokens of a micro-batch, without padding; `sequence_N` is the completion of a token.
Sums are divided by a denominator that is counted over all micro-batches and ranks, so the split of a batch can't change
its gradient.

Legend: N trained tokens of the micro-batch, S completions of the micro-batch.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 80.0
"""Bound of exponentiated log-ratios: float32 overflows at e^88, and infinity times a gradient of 0 is NaN."""


class LossOutput(NamedTuple):
    """A loss for the backward pass, and metrics to combine over micro-batches and ranks.

    `sums` are sums over trained tokens, or over a reward model's comparisons, to be divided by their global number;
    `maxima` combine by maximum.
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
    """Compute pi_theta / pi_theta_old, float [N].

    `token`: for each token (as in the paper). `sequence`: the geometric mean over the completion, with the gradient
    through the mean (GSPO, arXiv:2507.18071 eq. 7). Ratios are cut at e^MAX_LOG_RATIO, without a gradient.
    """
    log_ratio_N = logprobs_N - policy_logprobs_N
    if level == "token":
        return _quotient(log_ratio_N)
    zeros_S = log_ratio_N.new_zeros(num_sequences)
    lengths_S = zeros_S.index_add(0, sequence_N, torch.ones_like(log_ratio_N))
    mean_S = zeros_S.index_add(0, sequence_N, log_ratio_N) / lengths_S.clamp(min=1)
    return _quotient(mean_S)[sequence_N]


def clipped_surrogate(*, ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Compute min(ratio A, clip(ratio, 1 - low, 1 + high) A), float [N] (PPO, arXiv:1707.06347 eq. 7)."""
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def cispo_surrogate(
    *, ratio_N: Tensor, advantages_N: Tensor, logprobs_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Compute stop_gradient(clip(ratio)) A log pi, float [N], with every token's gradient (arXiv:2506.13585 eq. 4)."""
    return ratio_N.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_N * logprobs_N


def k3_divergence(*, logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Compute D_KL(pi_theta || pi_ref) = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0, float [N] (eq. 33)."""
    log_ratio_N = ref_logprobs_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


def importance_weight(*, policy_logprobs_N: Tensor, rollout_logprobs_N: Tensor, cap: float) -> Tensor:
    """Compute min(pi_trainer / pi_rollout, cap), float [N], without gradient.

    Truncated importance sampling corrects the gap between the engine that sampled and the engine that trains.
    """
    return (policy_logprobs_N - rollout_logprobs_N).exp().clamp(max=cap)


def mismatch(gap_N: Tensor, sequence_N: Tensor, num_sequences: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure the gap between trainer and rollout, gap_N = log pi - log mu of every token before any mask.

    Returns sums over tokens, and maxima over tokens and over the sums of sequences.
    """
    absolute_N = gap_N.abs()
    sums = {"mismatch/abs_mean": absolute_N.sum(), "mismatch/k3_mean": (_quotient(gap_N) - gap_N - 1).sum()}
    sequences = absolute_N.new_zeros(num_sequences).index_add_(0, sequence_N, absolute_N)
    return sums, {"mismatch/abs_max": absolute_N.max(), "mismatch/sequence_max": sequences.max()}


class PolicyTokens(NamedTuple):
    """The trained tokens of a micro-batch; tensors are float [N].

    logprobs_N: of the policy in training, with a gradient. policy_logprobs_N: of the policy before this batch's first
    update. rollout_logprobs_N: of the engine that sampled. ref_logprobs_N: of the frozen reference, None without KL
    term. weights_N: aggregation weights. sequence_N: int64 [N], the completion of each token, < num_sequences.
    """

    logprobs_N: Tensor
    policy_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    advantages_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor
    num_sequences: int


def grpo_loss(
    tokens: PolicyTokens,
    *,
    denominator: float,
    clip_low: float,
    clip_high: float,
    ratio: Literal["token", "sequence"],
    surrogate: Literal["clip", "cispo"],
    kl_coef: float,
    importance_cap: float | None,
) -> LossOutput:
    """Compute -J of one micro-batch, a scalar, and its metrics.

    loss = sum(weights * per_token) / denominator (see objectives.aggregate). A weight of 0 removes a token from
    loss and divergence, even if its log-probabilities are not finite. Metrics are over all tokens.
    """
    all_logprobs_N, all_policy_N = tokens.logprobs_N.detach(), tokens.policy_logprobs_N
    advantages_N, weights_N = tokens.advantages_N, tokens.weights_N
    trained_N = weights_N != 0
    # Mask before the exponential, because a weight of 0 times an overflow is NaN.
    logprobs_N, policy_logprobs_N = (torch.where(trained_N, x, 0.0) for x in (tokens.logprobs_N, all_policy_N))
    sequences: dict[str, Any] = {"sequence_N": tokens.sequence_N, "num_sequences": tokens.num_sequences}
    ratio_N = importance_ratio(logprobs_N=logprobs_N, policy_logprobs_N=policy_logprobs_N, level=ratio, **sequences)
    clipping: dict[str, Any] = {"ratio_N": ratio_N, "advantages_N": advantages_N}
    clipping |= {"clip_low": clip_low, "clip_high": clip_high}
    if surrogate == "clip":
        objective_N = clipped_surrogate(**clipping)
    else:
        objective_N = cispo_surrogate(logprobs_N=logprobs_N, **clipping)
    if importance_cap is not None:
        objective_N = objective_N * importance_weight(
            policy_logprobs_N=all_policy_N, rollout_logprobs_N=tokens.rollout_logprobs_N, cap=importance_cap
        )
    sums, maxima = mismatch(all_policy_N - tokens.rollout_logprobs_N, tokens.sequence_N, tokens.num_sequences)
    if (ref_logprobs_N := tokens.ref_logprobs_N) is not None:
        kl_N = k3_divergence(logprobs_N=logprobs_N, ref_logprobs_N=torch.where(trained_N, ref_logprobs_N, 0.0))
        objective_N = objective_N - kl_coef * kl_N
        all_log_ratio_N = ref_logprobs_N - all_logprobs_N
        sums["loss/kl_mean"] = (_quotient(all_log_ratio_N) - all_log_ratio_N - 1).sum()
    loss = -(weights_N * torch.where(trained_N, objective_N, 0.0)).sum() / denominator
    ratio_N = importance_ratio(logprobs_N=all_logprobs_N, policy_logprobs_N=all_policy_N, level=ratio, **sequences)
    sums |= {
        "loss/ratio_mean": ratio_N.sum(),
        "loss/ratio_clipped_mean": ((ratio_N < 1 - clip_low) | (ratio_N > 1 + clip_high)).float().sum(),
        "loss/surprisal_mean": -all_logprobs_N.sum(),
    }
    return LossOutput(loss, sums, maxima)


def _quotient(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()
