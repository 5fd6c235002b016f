"""The GRPO objective in the factors of the equation: ratio, surrogate, divergence, aggregate.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(ratio A_i, clip(ratio, 1 - low, 1 + high) A_i) - beta D_KL ) ]

is the form of single tokens (DeepSeekMath eq. 3, DeepSeek-V3.2 section 3.1). DeepSeek-V2 eq. 32-33 and DeepSeek-R1 eq.
1-2 print ratio and divergence of whole completions, without 1/|o_i|: a completion's value stands at each of its tokens
here, so that their mean is the value itself.

Tensors are flat over the trained tokens of a micro-batch, without padding; `sequence_N` is the completion of a token.
Sums are divided by a denominator that is counted over all micro-batches and ranks, so the split of a batch can't change
its gradient.

Legend: N trained tokens of the micro-batch, S completions of the micro-batch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from configs.grpo import Level, ObjectiveConfig

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


def at_level(level: Level, log_ratio_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return each token's log-ratio at a level, float [N]: its own, or the mean (`sequence`) or sum (`completion`) of
    its completion."""
    if level == "token":
        return log_ratio_N
    sums_S = log_ratio_N.new_zeros(num_sequences).index_add(0, sequence_N, log_ratio_N)
    if level == "sequence":
        sums_S = sums_S / torch.bincount(sequence_N, minlength=num_sequences).clamp(min=1)
    return sums_S[sequence_N]


def importance_ratio(
    *, logprobs_N: Tensor, policy_logprobs_N: Tensor, sequence_N: Tensor, num_sequences: int, level: Level
) -> Tensor:
    """Compute pi_theta / pi_theta_old, float [N].

    `token`: of each token (DeepSeekMath eq. 3). `sequence`: the geometric mean over the completion (GSPO,
    arXiv:2507.18071 eq. 7). `completion`: the product over the completion (DeepSeek-V2 eq. 32). The gradient passes
    through mean and product. Ratios are cut at e^MAX_LOG_RATIO, without a gradient.
    """
    return _quotient(at_level(level, logprobs_N - policy_logprobs_N, sequence_N, num_sequences))


def clipped_surrogate(
    *, ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float, clip_dual: float | None = None
) -> Tensor:
    """Compute min(ratio A, clip(ratio, 1 - low, 1 + high) A), float [N] (PPO, arXiv:1707.06347 eq. 7).

    With `clip_dual` a negative advantage gives clip_dual A at least (dual clip, arXiv:1912.09729 eq. 5).
    """
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if clip_dual is None:
        return surrogate_N
    return torch.where(advantages_N < 0, torch.maximum(surrogate_N, clip_dual * advantages_N), surrogate_N)


def cispo_surrogate(
    *, ratio_N: Tensor, advantages_N: Tensor, logprobs_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Compute stop_gradient(clip(ratio)) A log pi, float [N], with every token's gradient (arXiv:2506.13585 eq. 4)."""
    return ratio_N.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_N * logprobs_N


def k3_divergence(*, logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Compute D_KL(pi_theta || pi_ref) = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0, float [N] (DeepSeekMath eq.
    4). The inputs are log-probabilities of tokens or of whole completions (DeepSeek-V2 eq. 33)."""
    log_ratio_N = ref_logprobs_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


def entropy_term(*, ratio_N: Tensor, logprobs_N: Tensor, baseline_N: Tensor) -> Tensor:
    """Compute ratio (-log pi - baseline), float [N], of which only the ratio has a gradient.

    In the mean over tokens of pi_theta_old, its gradient is that of the entropy of pi_theta at each place, whatever the
    baseline, which lowers the variance.
    """
    return ratio_N * (-logprobs_N.detach() - baseline_N)


def importance_weight(
    log_ratio_N: Tensor, *, cap: float, floor: float = 0.0, mode: Literal["truncate", "mask"] = "truncate"
) -> Tensor:
    """Compute the weight pi_trainer / pi_rollout from its logarithm at any level, float [N], without gradient.

    It corrects the gap between the engine that sampled and the engine that trains. `truncate`: min(weight, cap).
    `mask`: 0 outside [floor, cap].
    """
    weight_N = log_ratio_N.detach().exp()
    if mode == "truncate":
        return weight_N.clamp(max=cap)
    return torch.where((weight_N >= floor) & (weight_N <= cap), weight_N, 0.0)


def off_policy_mask(
    *, gap_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, num_sequences: int, max_gap: float
) -> Tensor:
    """Return float [N]: 0 for completions of negative advantage whose mean of gap_N = log pi_rollout - log pi_theta
    exceeds `max_gap` nats a token, else 1 (DeepSeek-V3.2 section 3.1)."""
    mean_N = at_level("sequence", gap_N.detach(), sequence_N, num_sequences)
    return 1.0 - ((advantages_N < 0) & (mean_N > max_gap)).to(gap_N.dtype)


def mismatch(
    gap_N: Tensor, sequence_N: Tensor, num_sequences: int, no_lag_N: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure the gap between trainer and rollout, gap_N = log pi - log mu of every token before any mask.

    no_lag_N: 1 for tokens that the trained weights sampled, 0 for those of earlier weights, which count as 0 in what is
    named no_lag. Returns sums over tokens, and maxima over tokens and over the sums of sequences.
    """

    def worst_sequence(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(num_sequences).index_add_(0, sequence_N, values_N).max()

    absolute_N = gap_N.abs()
    sums = {"mismatch/abs_mean": absolute_N.sum(), "mismatch/k3_mean": (_quotient(gap_N) - gap_N - 1).sum()}
    maxima = {"mismatch/abs_max": absolute_N.max(), "mismatch/sequence_max": worst_sequence(absolute_N)}
    if no_lag_N is not None:
        absolute_N = absolute_N * no_lag_N
        sums |= {"mismatch/no_lag_rate": no_lag_N.sum(), "mismatch/no_lag_abs_mean": absolute_N.sum()}
        maxima["mismatch/no_lag_sequence_max"] = worst_sequence(absolute_N)
    return sums, maxima


class PolicyTokens(NamedTuple):
    """The trained tokens of a micro-batch; tensors are float [N].

    logprobs_N: of the policy in training, with a gradient. policy_logprobs_N: of the policy before this batch's
    first update. rollout_logprobs_N: of the engine that sampled. ref_logprobs_N: of the frozen reference, None
    without KL term. kl_coef_N: beta of the token's prompt, None for the objective's. entropy_coef_N and
    entropy_baseline_N: of the entropy term, None without it. weights_N: aggregation weights. sequence_N: int64 [N], the
    completion of each token, < num_sequences. no_lag_N: see `mismatch`; None where no token has a lag.
    """

    logprobs_N: Tensor
    policy_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    advantages_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    kl_coef_N: Tensor | None = None
    entropy_coef_N: Tensor | None = None
    entropy_baseline_N: Tensor | None = None
    no_lag_N: Tensor | None = None


def grpo_loss(tokens: PolicyTokens, objective: ObjectiveConfig, *, denominator: float) -> LossOutput:
    """Compute -J of one micro-batch, a scalar, and its metrics.

    loss = sum(weights * per_token) / denominator (see objectives.aggregate). A weight of 0 removes a token from
    loss and divergence, even if its log-probabilities are not finite. Metrics are over all tokens.
    """
    trained_N = tokens.weights_N != 0
    trained = _trained(tokens, trained_N)
    objective_N = _policy_term(trained, objective)
    gap_N = tokens.policy_logprobs_N - tokens.rollout_logprobs_N
    sums, maxima = mismatch(gap_N, tokens.sequence_N, tokens.num_sequences, tokens.no_lag_N)
    if tokens.ref_logprobs_N is not None:
        kl_coef = objective.kl_coef if tokens.kl_coef_N is None else tokens.kl_coef_N
        objective_N = objective_N - kl_coef * divergence(trained, objective)
        log_ratio_N = tokens.ref_logprobs_N - tokens.logprobs_N.detach()
        sums["loss/kl_mean"] = (_quotient(log_ratio_N) - log_ratio_N - 1).sum()
    if tokens.entropy_coef_N is not None and tokens.entropy_baseline_N is not None:
        ratio_N = _ratio(trained, "token")
        objective_N = objective_N + tokens.entropy_coef_N * entropy_term(
            ratio_N=ratio_N, logprobs_N=trained.logprobs_N, baseline_N=tokens.entropy_baseline_N
        )
    loss = -(tokens.weights_N * torch.where(trained_N, objective_N, 0.0)).sum() / denominator
    ratio_N = _ratio(tokens._replace(logprobs_N=tokens.logprobs_N.detach()), objective.ratio)
    clipped_N = (ratio_N < 1 - objective.clip_low) | (ratio_N > 1 + objective.clip_high)
    sums |= {
        "loss/ratio_mean": ratio_N.sum(),
        "loss/ratio_clipped_mean": clipped_N.float().sum(),
        "loss/surprisal_mean": -tokens.logprobs_N.detach().sum(),
    }
    if objective.off_policy_mask is not None:
        sums["loss/off_policy_masked_mean"] = (1 - _off_policy_mask(tokens, objective.off_policy_mask)).sum()
    return LossOutput(loss, sums, maxima)


def divergence(tokens: PolicyTokens, objective: ObjectiveConfig) -> Tensor:
    """Compute D_KL to the reference, float [N]: k3 of tokens, or of whole completions where the ratio is theirs.

    `kl: unbiased` multiplies k3 by pi_theta / pi_theta_old inside the graph (DeepSeek-V3.2 section 3.1), so that its
    gradient is that of the divergence itself.
    """
    assert tokens.ref_logprobs_N is not None, "there is no reference"
    logprobs_N, ref_logprobs_N = tokens.logprobs_N, tokens.ref_logprobs_N
    if objective.ratio == "completion":
        logprobs_N, ref_logprobs_N = (
            at_level("completion", x, tokens.sequence_N, tokens.num_sequences) for x in (logprobs_N, ref_logprobs_N)
        )
    k3_N = k3_divergence(logprobs_N=logprobs_N, ref_logprobs_N=ref_logprobs_N)
    return k3_N * _ratio(tokens, "token") if objective.kl == "unbiased" else k3_N


def _policy_term(tokens: PolicyTokens, objective: ObjectiveConfig) -> Tensor:
    """Surrogate of each token, times its importance weight and the off-policy mask."""
    ratio_N = _ratio(tokens, objective.ratio)
    bounds = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
    if objective.surrogate == "cispo":
        term_N = cispo_surrogate(
            ratio_N=ratio_N, advantages_N=tokens.advantages_N, logprobs_N=tokens.logprobs_N, **bounds
        )
    else:
        term_N = clipped_surrogate(
            ratio_N=ratio_N, advantages_N=tokens.advantages_N, **bounds, clip_dual=objective.clip_dual
        )
    if objective.importance_cap is not None:
        gap_N = tokens.policy_logprobs_N - tokens.rollout_logprobs_N
        term_N = term_N * importance_weight(
            at_level(objective.importance_level, gap_N, tokens.sequence_N, tokens.num_sequences),
            cap=objective.importance_cap,
            floor=objective.importance_floor,
            mode=objective.importance_mode,
        )
    if objective.off_policy_mask is not None:
        term_N = term_N * _off_policy_mask(tokens, objective.off_policy_mask)
    return term_N


def _ratio(tokens: PolicyTokens, level: Level) -> Tensor:
    return importance_ratio(
        logprobs_N=tokens.logprobs_N,
        policy_logprobs_N=tokens.policy_logprobs_N,
        sequence_N=tokens.sequence_N,
        num_sequences=tokens.num_sequences,
        level=level,
    )


def _off_policy_mask(tokens: PolicyTokens, max_gap: float) -> Tensor:
    return off_policy_mask(
        gap_N=tokens.rollout_logprobs_N - tokens.logprobs_N,
        advantages_N=tokens.advantages_N,
        sequence_N=tokens.sequence_N,
        num_sequences=tokens.num_sequences,
        max_gap=max_gap,
    )


def _trained(tokens: PolicyTokens, trained_N: Tensor) -> PolicyTokens:
    """Set the log-probabilities of untrained tokens to 0, before any exponential: 0 times an overflow is NaN."""
    logprobs = {name: getattr(tokens, name) for name in PolicyTokens._fields if name.endswith("logprobs_N")}
    return tokens._replace(
        **{name: None if x is None else torch.where(trained_N, x, 0.0) for name, x in logprobs.items()}
    )


def _quotient(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()
